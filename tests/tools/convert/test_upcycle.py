"""`llada convert upcycle`: a mixture of experts computes what its dense parent does, under every layout."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch

from llada_megatron.cli import main
from llada_megatron.llada_moe.config import MoEConfig, dump_yaml, load_model
from llada_megatron.parallel.checkpoint.conversion.shard_reader import ShardedReader
from llada_megatron.tools.convert import parse_layout
from llada_megatron.tools.convert.importer import STEP
from llada_megatron.tools.convert.upcycler import NEARLY_EQUAL, sum_is_constant, weight_sum
from tests.ranks import run_ranks
from tests.tools.convert.checkpoints import bits, read, to_huggingface, to_sharded, with_tokenizer, written

DENSE = load_model("tiny-dense")
TOKENS = torch.randint(4, 256, (2, 32), generator=torch.Generator().manual_seed(5))
UP, DOWN = "decoder.layers.{}.mlp.linear_fc1.weight", "decoder.layers.{}.mlp.linear_fc2.weight"
EXPERT_UP, EXPERT_DOWN = (f"decoder.layers.{{}}.mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2))
ROUTER = "decoder.layers.{}.mlp.router.weight"

MODELS = {
    "every layer": ("llada2", MoEConfig(num_experts=4, top_k=2, expert_ffn_hidden_size=128, score_function="sigmoid")),
    "LLaDA2": (
        "llada2",
        MoEConfig(
            num_experts=8,
            top_k=4,
            expert_ffn_hidden_size=128,
            shared_expert_ffn_hidden_size=64,
            leading_dense_layers=1,
            score_function="sigmoid",
            expert_bias=True,
            num_expert_groups=4,
            expert_groups_top_k=2,
            routed_scaling_factor=2.5,
        ),
    ),
    "LLaDA2.2": (
        "llada2",
        MoEConfig(
            num_experts=8,
            top_k=2,
            expert_ffn_hidden_size=128,
            leading_dense_layers=3,
            score_function="sigmoid",
            expert_bias=True,
            expert_capacity=4,
            routing_block_size=8,
        ),
    ),
    "LLaDA-MoE": ("llada_moe", MoEConfig(num_experts=8, top_k=2, expert_ffn_hidden_size=128)),
    "Qwen3-MoE": (
        "qwen3_moe",
        MoEConfig(num_experts=4, top_k=2, expert_ffn_hidden_size=128, score_function="softmax_normalized"),
    ),
    "one of four": (
        "llada2",
        MoEConfig(num_experts=4, top_k=1, expert_ffn_hidden_size=128, score_function="sigmoid", leading_dense_layers=2),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def upcycle(*arguments):
    return main(["convert", "upcycle", *map(str, arguments)])


def model_file(folder, name, **changes):
    """A YAML file of one of MODELS."""
    family, moe = MODELS[name]
    path = folder / f"{name.replace(' ', '-')}.yaml"
    path.write_text(dump_yaml(replace(DENSE, **({"family": family, "moe": moe} | changes))))
    return path


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    root = tmp_path_factory.mktemp("upcycle")
    to_sharded(with_tokenizer(written(root / "source", "tiny-dense", "fp32")), root / "parent", "tensor_parallel=2")
    return root / "parent"


@pytest.fixture(scope="module")
def upcycled(parent):
    """Every one of MODELS from the parent, by name."""
    layouts = ("", "expert_parallel=2", "pipeline_parallel=2", "tensor_parallel=2,expert_tensor_parallel=2", "", "")
    made = {}
    for (number, name), layout in zip(enumerate(MODELS), layouts, strict=True):
        made[name] = parent.parent / f"made-{number}"
        options = ["--layout", layout] if layout else []
        assert upcycle(parent, made[name], "--model", model_file(parent.parent, name), *options) == 0
    return made


def _logits(layout, paths):
    """What `load_checkpoint` computes under a layout from each of the checkpoints."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint

    topology.initialize(layout, 7)
    boundaries = torch.arange(0, TOKENS.numel() + 1, TOKENS.shape[1], dtype=torch.int32)
    everywhere = torch.ones_like(TOKENS, dtype=torch.bool)
    return [load_checkpoint(path, layout).logits(TOKENS, everywhere, boundaries) for path in paths]


@pytest.fixture(scope="module")
def expected(parent):
    """The parent's logits in one process."""
    return run_ranks(_logits, 1, parse_layout(None), [parent])[0][0]


@pytest.mark.parametrize(
    "layout",
    [
        None,
        "tensor_parallel=2,expert_tensor_parallel=2",
        "pipeline_parallel=2,expert_parallel=2",
    ],
)
def test_the_logits_are_those_of_the_dense_parent(expected, upcycled, layout):
    ranks = parse_layout(layout)
    assert expected.abs().max() > 1
    for found in run_ranks(_logits, ranks.world_size, ranks, list(upcycled.values())):
        for name, logits in zip(upcycled, found, strict=True):
            torch.testing.assert_close(
                logits, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_every_expert_is_a_copy_and_the_router_is_drawn(parent, upcycled):
    dense, made = ShardedReader(parent / STEP), ShardedReader(upcycled["every layer"] / STEP)
    for layer in range(DENSE.num_layers):
        for expert in range(4):
            assert bits(made.read(EXPERT_UP.format(layer), (expert,))) == bits(dense.read(UP.format(layer)))
            assert bits(made.read(EXPERT_DOWN.format(layer), (expert,))) == bits(dense.read(DOWN.format(layer)))
        router = made.read(ROUTER.format(layer))
        assert 0.5 < float(router.std()) / DENSE.init_std < 1.5
        assert not torch.equal(router, made.read(ROUTER.format((layer + 1) % DENSE.num_layers)))
    attention = "decoder.layers.2.self_attention.linear_qkv.weight"
    assert bits(made.read(attention)) == bits(dense.read(attention))


def test_the_scaling_factor_is_taken_out_of_the_experts_and_first_layers_stay_dense(parent, upcycled):
    dense, made = ShardedReader(parent / STEP), ShardedReader(upcycled["LLaDA2"] / STEP)
    assert bits(made.read(DOWN.format(0))) == bits(dense.read(DOWN.format(0))) and ROUTER.format(0) not in made.tensors
    torch.testing.assert_close(made.read(EXPERT_DOWN.format(1), (7,)) * 2.5, dense.read(DOWN.format(1)))
    assert not made.read("decoder.layers.1.mlp.shared_experts.linear_fc2.weight").any()
    assert float(made.read("decoder.layers.1.mlp.shared_experts.linear_fc1.weight").std()) > 0
    bias = made.read("decoder.layers.1.mlp.router.expert_bias")
    assert bias.dtype == torch.float32 and not bias.any()


def test_weights_of_the_chosen_experts():
    assert {name: weight_sum(moe) for name, (_, moe) in MODELS.items()} == {
        "every layer": 1.0,
        "LLaDA2": 1.0,
        "LLaDA2.2": 1.0,
        "LLaDA-MoE": 0.25,
        "Qwen3-MoE": 1.0,
        "one of four": 0.5,
    }
    assert [name for name, (_, moe) in MODELS.items() if not sum_is_constant(moe)] == ["LLaDA-MoE", "one of four"]


def test_a_router_whose_weights_add_up_differently_is_drawn_small(upcycled):
    router = ShardedReader(upcycled["LLaDA-MoE"] / STEP).read(ROUTER.format(0))
    assert 0.5 < float(router.std()) * math.sqrt(DENSE.hidden_size) / NEARLY_EQUAL < 1.5


def test_the_short_form_says_where_it_comes_from_and_is_exported(parent, tmp_path, capsys):
    options = ("--experts", 4, "--dense-layers", 1, "--seed", 3)
    assert upcycle(parent, tmp_path / "moe", *options, "--json") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["experts"] == 4 and summary["notes"] == []
    model = load_model(tmp_path / "moe/model.yaml")
    assert (model.moe.top_k, model.moe.leading_dense_layers, model.moe.expert_ffn_hidden_size) == (2, 1, 128)
    reader = ShardedReader(tmp_path / "moe" / STEP)
    facts = reader.manifest.metadata
    assert facts["upcycled"] == {"from": str(parent / STEP), "experts": 4, "seed": 3}
    assert facts["tokenizer"]["path"] == str(tmp_path / "moe/tokenizer/tokenizer.json")
    assert (tmp_path / "moe/tokenizer/tokenizer.json").is_file()
    assert main(["convert", "inspect", str(tmp_path / "moe"), "--json"]) == 0
    history = json.loads(capsys.readouterr().out.splitlines()[-1])["history"]
    assert history["upcycled from"] == str(parent / STEP)
    to_huggingface(tmp_path / "moe", tmp_path / "exported")
    published = read(tmp_path / "exported")["model.layers.3.mlp.gate.weight"]
    assert bits(published) == bits(reader.read(ROUTER.format(3)))
    assert upcycle(parent, tmp_path / "again", *options[:4], "--seed", 4) == 0
    assert not torch.equal(ShardedReader(tmp_path / "again" / STEP).read(ROUTER.format(3)), published)


def test_a_division_that_bf16_rounds_is_noted(parent, tmp_path, capsys):
    assert upcycle(parent, tmp_path / "a", "--model", model_file(tmp_path, "LLaDA2"), "--dtype", "bf16") == 0
    assert "were divided by 2.5 and rounded to bf16" in capsys.readouterr().err
    assert upcycle(parent, tmp_path / "b", "--model", model_file(tmp_path, "LLaDA-MoE"), "--dtype", "bf16") == 0
    assert "rounded" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": replace(MODELS["every layer"][1], expert_ffn_hidden_size=64)}, "moe.expert_ffn_hidden_size is 64"),
        ({"hidden_size": 32}, "hidden_size is 32, and 64 in the parent"),
        ({"rope_theta": 10000.0, "mask_token_id": 7}, "mask_token_id is 7, and 3 in the parent; rope_theta is 10000.0"),
        ({"moe": None, "family": "llada"}, "has no experts: give one with a `moe` section"),
    ],
)
def test_a_model_that_cannot_hold_the_copies_is_refused(parent, tmp_path, capsys, changes, words):
    assert upcycle(parent, tmp_path / "out", "--model", model_file(tmp_path, "every layer", **changes)) == 2
    captured = capsys.readouterr()
    assert words in captured.err and len(captured.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--experts", "0"], "moe.num_experts"),
        (["--experts", "2", "--top-k", "3"], "3 experts per token, but there are only 2"),
        (["--experts", "2", "--dense-layers", "4"], "leaves no MoE layer"),
        (["--experts", "3", "--layout", "expert_parallel=2"], "--layout: expert_parallel"),
        (["--model", "tiny-moe", "--top-k", "2"], "leave out the option"),
    ],
)
def test_options_that_cannot_work_are_refused(parent, tmp_path, capsys, options, words):
    assert upcycle(parent, tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_parent_with_experts_and_a_published_directory_are_refused(parent, upcycled, tmp_path, capsys):
    assert upcycle(upcycled["every layer"], tmp_path / "out", "--experts", 4) == 1
    assert "has 4 experts already: only a dense model is upcycled" in capsys.readouterr().err
    assert upcycle(parent.parent / "source", tmp_path / "out", "--experts", 4) == 1
    assert "llada convert import" in capsys.readouterr().err
