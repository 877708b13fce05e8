"""Which optional GPU libraries a run uses: decided by importing them, and hidden where a run cannot use them."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from types import SimpleNamespace

import pytest

from llada_megatron.llada_moe.model import accelerations
from llada_megatron.tools import environment
from tests import te_stub


@pytest.fixture
def unsettled(monkeypatch):
    """As in a new process: nothing is settled, and no part of the libraries is loaded or hidden."""
    monkeypatch.setattr(accelerations, "_settled", {})
    for name in accelerations.CUDNN_VARIABLES:  # which deciding may set
        monkeypatch.setenv(name, os.environ.get(name, ""))
    roots = {root for names in accelerations._ROOTS.values() for root in names}

    def loaded():
        return [name for name in sys.modules if name.split(".")[0] in roots]

    before = {name: sys.modules.pop(name) for name in loaded()}
    finders = list(sys.meta_path)
    yield monkeypatch
    sys.meta_path[:] = finders
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(before)


def installed(monkeypatch, version):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "transformer-engine" else real(name)
    )


CASES = {
    "not installed": (None, True, False, "not installed"),
    "broken": (
        {"broken": "te.so: undefined symbol: _ZN3c10"},
        True,
        False,
        "undefined symbol: _ZN3c10; most likely it",
    ),
    "no GPU": (
        {},
        False,
        False,
        "no usable GPU; it was not imported, so whether a machine with one could use it is not",
    ),
    "too old": ({"version": "2.12.0"}, True, True, "2.12.0 is older than 2.15"),
    "used": ({}, True, True, "fused kernels, experts in FP8 and float32"),
}


@pytest.mark.parametrize(("stub", "cuda", "active", "detail"), CASES.values(), ids=CASES)
def test_transformer_engine_is_what_env_says(unsettled, stub, cuda, active, detail):
    if stub is not None:
        te_stub.provide(**stub)
        installed(unsettled, stub.get("version", "2.20.2"))
    elif accelerations.present("transformer_engine"):
        pytest.skip("Transformer Engine is installed here")
    unsettled.setattr(accelerations.torch.cuda, "is_available", lambda: cuda)
    unsettled.setattr(environment, "attention_state", lambda *_: {})  # which asks the GPU what it can
    said = environment.active_accelerations()["transformer-engine"]
    assert said["active"] is active and detail in said["detail"]
    assert accelerations.transformer_engine_active() is active
    assert importable("transformer_engine.pytorch.optimizers") is active  # what Megatron would find
    assert importable("transformer_engine") is active


def importable(module):
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def test_what_was_imported_before_is_hidden_too(unsettled):
    te_stub.provide()
    import transformer_engine.pytorch.optimizers  # noqa: F401

    accelerations.settle(cuda=False)
    with pytest.raises(ImportError):
        from transformer_engine.pytorch.optimizers import FusedAdam  # noqa: F401


def test_a_decision_is_made_once(unsettled):
    accelerations.settle(cuda=False)
    first = accelerations.transformer_engine()
    te_stub.provide()
    accelerations.settle(cuda=True)
    assert accelerations.transformer_engine() is first


@pytest.mark.parametrize(
    ("folders", "extension", "cuda", "engine", "active", "detail"),
    [
        ((), False, True, False, False, "not installed"),
        (("apex",), False, True, False, False, "not NVIDIA's"),
        (("apex", "apex/multi_tensor_apply"), False, True, False, False, "without its CUDA extensions"),
        (("apex", "apex/multi_tensor_apply"), True, False, False, False, "hidden from Megatron"),
        (("apex", "apex/multi_tensor_apply"), True, True, True, False, "Transformer Engine's optimizer"),
        (("apex", "apex/multi_tensor_apply"), True, True, False, True, "Adam, and the norm"),
    ],
)
def test_which_apex_it_is(tmp_path, unsettled, folders, extension, cuda, engine, active, detail):
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    if extension:
        (tmp_path / "amp_C.py").write_text("")
    unsettled.syspath_prepend(tmp_path)
    state = accelerations.decide_apex(cuda, engine)
    assert state.active is active and detail in state.detail
    accelerations.settle(cuda=False)
    assert not accelerations.present("apex")


ALL = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0", "flash-attn-4": "4.0.0b11"}
V2 = {"flash-attn": "2.8.3"}
PREFERRED = "Transformer Engine prefers it to cuDNN's attention"
AFTER_CUDNN = "used where cuDNN's attention, which Transformer Engine prefers on this GPU, cannot serve"


@pytest.mark.parametrize(
    ("installed", "taken", "cuda", "engine", "capability", "version", "detail"),
    [
        ({}, (), True, True, (9, 0), None, "not installed"),
        (V2, (2,), False, False, (9, 0), None, "no usable GPU"),
        (V2, (2,), True, False, (9, 0), None, "only Transformer Engine's attention"),
        (V2, (2,), True, True, (9, 0), "2.8.3", AFTER_CUDNN),
        (V2, (2,), True, True, (8, 0), "2.8.3", PREFERRED),
        ({"flash-attn": "2.8.4"}, (), True, True, (8, 0), None, "takes flash-attn >= 2.1.1, < 2.8.4"),
        ({"flash-attn": "2.7.1"}, (), True, True, (10, 0), None, "takes flash-attn >= 2.7.3, < 2.8.4"),
        (ALL, (2, 3, 4), True, True, (9, 0), "3.0.0", AFTER_CUDNN),
        (ALL, (2, 3, 4), True, True, (10, 0), "4.0.0b11", AFTER_CUDNN),
        (ALL, (2, 3), True, True, (10, 0), "2.8.3", AFTER_CUDNN),
        (ALL, (2, 3, 4), True, True, (8, 0), "2.8.3", PREFERRED),
        (ALL, (2, 4), True, True, (9, 0), "4.0.0b11", AFTER_CUDNN),
    ],
)
def test_which_flash_attention(unsettled, installed, taken, cuda, engine, capability, version, detail):
    """`taken` stands for what Transformer Engine found usable when it was imported."""
    utils = SimpleNamespace(version_required="2.1.1", version_required_blackwell="2.7.3", max_version="2.8.4")
    utils.is_installed, utils.v3_is_installed, utils.v4_is_installed = (number in taken for number in (2, 3, 4))
    module = SimpleNamespace(FlashAttentionUtils=utils)
    unsettled.setitem(sys.modules, f"{accelerations._DOT_PRODUCT_ATTENTION}.utils", module)
    unsettled.setattr(accelerations, "_version", installed.get)
    unsettled.setattr(accelerations.torch.cuda, "get_device_capability", lambda: capability)
    state = accelerations.decide_flash_attention(cuda, engine)
    assert state.active is (version is not None) and detail in state.detail
    if version is not None:
        assert state.version == version
        unsettled.setenv("NVTE_FLASH_ATTN", "0")
        assert not accelerations.decide_flash_attention(cuda, engine).active


def test_the_cudnn_of_torch_is_loaded_before_transformer_engine_looks_for_one(monkeypatch, tmp_path):
    """Transformer Engine takes the system's otherwise, and both mix in one process."""
    folder = tmp_path / "nvidia" / "cudnn" / "lib"
    folder.mkdir(parents=True)
    parts = [folder / f"libcudnn{part}.so.9" for part in ("", "_graph", "_ops")]
    for part in parts:
        part.touch()
    loaded = []

    def load(path, mode):
        loaded.append(path)
        if path.endswith("_ops.so.9"):
            raise OSError("libcublas.so.13: cannot open shared object file")

    monkeypatch.setattr(accelerations.ctypes, "CDLL", load)
    monkeypatch.setattr(accelerations.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.delenv("CUDNN_HOME", raising=False)
    monkeypatch.setenv("CUDNN_PATH", "/opt/cudnn")
    accelerations._load_cudnn_of_torch()
    assert loaded == [] and "CUDNN_HOME" not in accelerations.os.environ
    monkeypatch.delenv("CUDNN_PATH")
    monkeypatch.setenv("CUDNN_HOME", "")
    accelerations._load_cudnn_of_torch()
    assert sorted(loaded) == sorted(map(str, parts))
    assert accelerations.os.environ["CUDNN_HOME"] == str(folder.parent)
