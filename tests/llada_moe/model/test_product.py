from __future__ import annotations

import pytest
import torch

from llada_megatron.llada_moe.model import linear as module
from llada_megatron.llada_moe.model.linear import product, torchs_own


@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (7, 1, 24), (33, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("faster", [True, False])
def test_is_torchs_product_whichever_library_computes_it(shape, dtype, faster, monkeypatch):
    if faster and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(module, "onednn_is_faster", lambda: faster)
    x, weight = torch.randn(shape).to(dtype), torch.randn(40, 24).to(dtype)[::2]
    with torch.inference_mode(), torchs_own():
        own = product(x, weight)
    assert torch.equal(own, torch.nn.functional.linear(x, weight))
    with torch.inference_mode():
        torch.testing.assert_close(product(x, weight), own)


@pytest.mark.parametrize(("vendor", "faster"), [("AuthenticAMD", True), ("GenuineIntel", False)])
def test_the_choice_goes_by_the_processor(vendor, faster, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
    monkeypatch.setattr(module, "_PROCESSORS", tmp_path / "cpuinfo")
    module.onednn_is_faster.cache_clear()
    try:
        assert module.onednn_is_faster() == (faster and torch.backends.mkldnn.is_available())
        monkeypatch.setattr(module, "_PROCESSORS", tmp_path / "nowhere")
        module.onednn_is_faster.cache_clear()
        assert not module.onednn_is_faster()
    finally:
        module.onednn_is_faster.cache_clear()
