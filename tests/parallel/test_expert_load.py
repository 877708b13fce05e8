"""Expert load: every token counts once at each expert it visits, also under full recomputation."""

from __future__ import annotations

import pytest
import torch

from llada_megatron.parallel import device

device.install()

from llada_megatron.llada_moe.config.layout import LayoutConfig  # noqa: E402
from llada_megatron.llada_moe.config.model import (  # noqa: E402
    ModelConfig,
    MoEConfig,
)
from llada_megatron.llada_moe.config.training import TrainingConfig  # noqa: E402
from llada_megatron.llada_moe.model.head import Targets  # noqa: E402
from llada_megatron.llada_moe.model.transformer import build_model  # noqa: E402
from llada_megatron.parallel import topology  # noqa: E402
from llada_megatron.parallel.build import transformer_config  # noqa: E402
from llada_megatron.parallel.expert_load import ExpertLoad, load_scalars, summarize, tell_mask_ratio  # noqa: E402

TOKENS, EXPERTS, TOP_K = 2 * 16, 4, 2
MODEL = ModelConfig(
    family="llada2", num_layers=3, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, vocab_size=64, max_sequence_length=16, mask_token_id=3, eos_token_id=2,
    moe=MoEConfig(num_experts=EXPERTS, top_k=TOP_K, expert_ffn_hidden_size=16, leading_dense_layers=1),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    topology.join(0, 1, init_method=f"file://{tmp_path_factory.mktemp('store')}/store")
    topology.initialize(LayoutConfig(), seed=1)
    yield
    topology.leave()


def make_model(recompute="none"):
    training = TrainingConfig(steps=1, sequence_length=16, global_batch_size=2, precision="fp32", recompute=recompute)
    return build_model(MODEL, transformer_config(MODEL, LayoutConfig(), training))


def loss_of(model):
    ids = torch.randint(4, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    return model(ids, targets=Targets.of(ids, torch.ones(2, 16))).sum()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_each_token_counts_once_per_expert_it_visits(recompute):
    model = make_model(recompute)
    load = ExpertLoad([model])
    for _ in range(3):
        loss_of(model).backward()
    counts = load.reduce()
    assert sorted(counts) == [2, 3]  # layer 1 is dense
    assert all(sum(row) == 3 * TOKENS * TOP_K and len(row) == EXPERTS for row in counts.values())
    assert load.reduce() == {2: [0] * EXPERTS, 3: [0] * EXPERTS}


def test_counts_are_what_the_router_decided():
    model = make_model()
    maps = []
    router = model.decoder.layers[1].mlp.router
    router.register_forward_hook(lambda _m, _i, output: maps.append(output[1]))
    load = ExpertLoad([model])
    loss_of(model)
    assert load.reduce()[2] == maps[0].sum(dim=0).tolist()


def test_evaluation_does_not_count_and_close_takes_the_hooks_off():
    model = make_model()
    load = ExpertLoad([model])
    with torch.no_grad():
        loss_of(model)
    model.eval()
    loss_of(model)
    assert all(sum(row) == 0 for row in load.reduce().values())
    load.close()
    model.train()
    loss_of(model)
    assert all(sum(row) == 0 for row in load.reduce().values())


def test_counts_by_the_mask_ratio_of_a_sequence():
    model = make_model()
    load = ExpertLoad([model])
    tell_mask_ratio(model, torch.tensor([0.2, 0.95]))
    loss_of(model)
    bins = load.reduce_bins()[2]
    assert [sum(row) for row in bins] == [0, TOKENS // 2 * TOP_K, *[0] * 7, TOKENS // 2 * TOP_K]
    load.close()


def test_a_dense_model_has_no_expert_load():
    assert ExpertLoad([torch.nn.Linear(2, 2)]).reduce() == {}
    assert load_scalars({}) == {}


def test_balance_of_a_layer():
    counts = {2: [4, 4, 4, 4], 3: [8, 8, 0, 0], 4: [0, 0, 0, 0]}
    summary = summarize(counts)
    assert (summary[2].max_over_mean, summary[2].dead) == (1.0, 0)
    assert (summary[3].max_over_mean, summary[3].dead) == (2.0, 2)
    assert (summary[4].max_over_mean, summary[4].dead) == (1.0, 4)
    scalars = load_scalars(counts)
    assert scalars["expert_load/max_over_mean"] == 2.0 and scalars["expert_load/dead"] == 6
    assert scalars["expert_load/layer_03/dead"] == 2
