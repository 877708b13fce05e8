"""The modelling files of an export: they load like published ones, and compute what our model does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.huggingface.formats import export_format
from llada_megatron.llada_moe.huggingface.formats.table import read_config
from llada_megatron.llada_moe.huggingface.mapping import tensor_shapes
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.parallel import topology
from llada_megatron.tools.bench.layouts import MODELS
from tests.llada_moe.huggingface import our_model
from tests.llada_moe.huggingface.exported import load, modules_in, random_peer, same_weights, write_without_weights

transformers = pytest.importorskip("transformers")

PLAIN = dataclasses.replace(
    MODELS["sigmoid"].moe, shared_expert_ffn_hidden_size=0, num_expert_groups=1, expert_groups_top_k=1,
    expert_bias=False, expert_bias_update_rate=0.0,
)  # fmt: skip
CASES = {
    **MODELS,
    "tied experts": dataclasses.replace(MODELS["softmax"], tie_embeddings=True, qk_norm=False),
    "wide heads": dataclasses.replace(MODELS["sigmoid"], head_dim=32, moe=PLAIN),
}
SEQ, PADDING, BLOCK = 24, 5, 7
CONFIGS = Path(__file__).parents[3] / "configs/models"


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    topology.join(0, 1, init_method=f"file://{tmp_path_factory.mktemp('store')}/store")
    topology.initialize(LayoutConfig(), seed=1)
    yield
    topology.leave()


@pytest.fixture(scope="module", autouse=True)
def cache_of_modules(tmp_path_factory):
    with modules_in(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Case -> directory of a random model with our modelling files, made on first use."""
    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            folder = tmp_path_factory.mktemp("exports") / f"{case.replace(' ', '-')}-model"
            random_peer(folder, CASES[case]).save_pretrained(folder)
            made[case] = folder
        return made[case]

    return make


def ours(peer, case: str, tokens: torch.Tensor, *attention) -> torch.Tensor:
    model = CASES[case]
    table = export_format(model)
    weights = our_model.canonical(table, model, peer.state_dict())
    return our_model.logits(model, weights, tokens, *attention)


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def ids(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 120, (batch, SEQ), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_ours_without_a_mask_and_with_blocks(peers, case):
    peer, tokens = load(peers(case)), ids()
    assert_same_logits(peer(tokens).logits, ours(peer, case, tokens))
    blocks = torch.arange(SEQ) // BLOCK
    seen = (blocks[:, None] >= blocks[None])[None, None]
    expected = ours(peer, case, tokens, AttentionPattern(BLOCK))
    assert_same_logits(peer(tokens, attention_mask=seen).logits, expected)
    added = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
    assert_same_logits(peer(tokens, attention_mask=added).logits, expected)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(peers, case):
    peer, text = load(peers(case)), ids(1)[:, PADDING:]
    pads, ones = torch.full((1, PADDING), 126), torch.ones_like(text)
    expected = ours(peer, case, text)
    left = peer(torch.cat([pads, text], 1), attention_mask=torch.cat([0 * pads, ones], 1)).logits[:, PADDING:]
    right = peer(torch.cat([text, pads], 1), attention_mask=torch.cat([ones, 0 * pads], 1)).logits[:, :-PADDING]
    assert_same_logits(left, expected)
    assert_same_logits(right, expected)


@pytest.mark.parametrize("case", CASES)
def test_weights_have_their_published_names_and_shapes(peers, case):
    model = CASES[case]
    stored = {name: tuple(tensor.shape) for name, tensor in load(peers(case)).state_dict().items()}
    if model.tie_embeddings:
        stored.pop("lm_head.weight", None)
    assert stored == PUBLISHED[model.family](model) == tensor_shapes(export_format(model), model)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_is_the_same_model(peers, case, tmp_path):
    peer = load(peers(case))
    peer.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert same_weights(peer, again)
    table = export_format(CASES[case])
    models = []
    for folder in (peers(case), tmp_path / "again"):
        file = folder / "config.json"
        models.append(read_config(table, json.loads(file.read_text()), str(file)))
    assert models[0] == models[1]


@pytest.mark.parametrize("case", CASES)
def test_the_model_without_its_output_layer_loads_too(peers, case):
    base, found = transformers.AutoModel.from_pretrained(peers(case), trust_remote_code=True, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    whole = load(peers(case))
    assert torch.equal(base.get_input_embeddings().weight, whole.get_input_embeddings().weight)


def test_the_expert_bias_stays_in_float32(peers):
    peer = load(peers("sigmoid"), dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in peer.state_dict().items()}
    biases = {name for name in dtypes if name.endswith("mlp.gate.expert_bias")}
    assert len(biases) == 3
    assert {name for name, dtype in dtypes.items() if dtype is torch.float32} == biases
    assert peer(ids()).logits.dtype is torch.bfloat16


@pytest.mark.parametrize("case", ["dense", "sigmoid"])
def test_the_loss_is_that_of_the_labelled_tokens_themselves(peers, case):
    peer, tokens = load(peers(case)).train(), ids()
    labels = torch.where(torch.arange(SEQ) % 3 == 0, tokens, -100)
    found = peer(tokens, labels=labels)
    chosen = labels != -100
    expected = torch.nn.functional.cross_entropy(found.logits[chosen], tokens[chosen])
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in peer.named_parameters()}
    peer.zero_grad()
    peer.gradient_checkpointing_enable()
    peer(tokens, labels=labels, return_dict=False)[0].backward()
    for name, parameter in peer.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_the_mask_of_blocks_comes_with_llada2(peers):
    peer = load(peers("sigmoid"))
    make = __import__(type(peer).__module__, fromlist=["block_causal_mask"]).block_causal_mask
    assert make(5, 2)[0, 0].int().tolist() == [[1, 1, 0, 0, 0]] * 2 + [[1, 1, 1, 1, 0]] * 2 + [[1, 1, 1, 1, 1]]
    assert torch.equal(make(5, 2, torch.bfloat16) == 0, make(5, 2))
    with pytest.raises(ValueError, match="3 dimensions"):
        peer(ids(), attention_mask=make(SEQ)[0])


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [("dense", "include_bias", True), ("softmax", "norm_topk_prob", True), ("sigmoid", "norm_head", True)],
)
def test_a_configuration_that_asks_for_something_else_is_refused(peers, case, key, value):
    config = transformers.AutoConfig.from_pretrained(peers(case), trust_remote_code=True)
    setattr(config, key, value)
    with pytest.raises(ValueError, match=key):
        transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("llada-8b", 291, 8_015_581_184),
        ("llada-moe-7b-a1b", 3219, 7_356_880_896),
        ("llada2-mini", 14813, 16_255_643_392),
        ("llada2-flash", 24161, 102_889_705_216),
        ("llada2.2-flash", 24161, 102_889_705_216),
    ],
)
def test_the_released_sizes(tmp_path, name, tensors, parameters):
    folder = write_without_weights(tmp_path / "released", load_model(CONFIGS / f"{name}.yaml"))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    state = peer.state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (tensors, parameters)


def feed_forward(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def published_llada(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, keys, width = model.hidden_size, model.num_key_value_heads * model.head_dim, model.ffn_hidden_size
    shapes = {"model.transformer.wte.weight": (model.vocab_size, hidden), "model.transformer.ln_f.weight": (hidden,)}
    if not model.tie_embeddings:
        shapes["model.transformer.ff_out.weight"] = (model.vocab_size, hidden)
    for layer in range(model.num_layers):
        block = {
            "attn_norm": (hidden,), "ff_norm": (hidden,), "q_proj": (hidden, hidden), "k_proj": (keys, hidden),
            "v_proj": (keys, hidden), "attn_out": (hidden, hidden), "ff_proj": (width, hidden),
            "up_proj": (width, hidden), "ff_out": (hidden, width),
        }  # fmt: skip
        shapes |= {f"model.transformer.blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def published_llada_moe(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, keys, moe = model.hidden_size, model.num_key_value_heads * model.head_dim, model.moe
    shapes = {"model.embed_tokens.weight": (model.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not model.tie_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        names = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate": (moe.num_experts, hidden),
        }  # fmt: skip
        if model.qk_norm:
            names |= {"self_attn.q_norm": (model.head_dim,), "self_attn.k_norm": (model.head_dim,)}
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in names.items()}
        for expert in range(moe.num_experts):
            shapes |= feed_forward(f"{prefix}.mlp.experts.{expert}", moe.expert_ffn_hidden_size, hidden)
    return shapes


def published_llada2(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, head, moe = model.hidden_size, model.head_dim, model.moe
    queries = model.num_attention_heads * head
    rows = queries + 2 * model.num_key_value_heads * head
    shapes = {"model.word_embeddings.weight": (model.vocab_size, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (model.vocab_size, hidden)
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        names = {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "attention.query_key_value": (rows, hidden), "attention.query_layernorm": (head,),
            "attention.key_layernorm": (head,), "attention.dense": (hidden, queries),
        }  # fmt: skip
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in names.items()}
        if layer < moe.leading_dense_layers:
            shapes |= feed_forward(f"{prefix}.mlp", model.ffn_hidden_size, hidden)
            continue
        shapes[f"{prefix}.mlp.gate.weight"] = (moe.num_experts, hidden)
        if moe.expert_bias:
            shapes[f"{prefix}.mlp.gate.expert_bias"] = (moe.num_experts,)
        for expert in range(moe.num_experts):
            shapes |= feed_forward(f"{prefix}.mlp.experts.{expert}", moe.expert_ffn_hidden_size, hidden)
        if moe.shared_expert_ffn_hidden_size:
            shapes |= feed_forward(f"{prefix}.mlp.shared_experts", moe.shared_expert_ffn_hidden_size, hidden)
    return shapes


PUBLISHED = {"llada": published_llada, "llada_moe": published_llada_moe, "llada2": published_llada2}
"""Names and shapes as the released checkpoints have them, written down apart from the tables."""
