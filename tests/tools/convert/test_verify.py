"""`llada convert verify`: says whether two checkpoints of any kinds are the same, and where the first difference is."""

import contextlib
import json
import math
import re
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron import cli
from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.huggingface import weights as canonical
from llada_megatron.tools.convert import logits, verifier
from llada_megatron.tools.convert.inspector import open_source
from tests.tools.convert.checkpoints import (
    MODELS,
    WORDS,
    config_of,
    tensors_of,
    to_sharded,
    with_tokenizer,
    write,
    written,
)

EXPERT = "model.layers.2.mlp.experts."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module", params=MODELS)
def pair(request, root):
    """A Hugging Face directory and what was imported from it."""
    source = written(root / request.param / "source", request.param, files=2)
    to_sharded(source, root / request.param / "sharded", "tensor_parallel=2,pipeline_parallel=2")
    return source, root / request.param / "sharded"


def verify(capsys, a, b, *options):
    """Exit code, printed lines, and the JSON object."""
    code = cli.main(["convert", "verify", str(a), str(b), *options, "--json"])
    captured = capsys.readouterr()
    *lines, report = captured.out.splitlines()
    return code, lines or captured.err.splitlines(), json.loads(report)


def altered(path, model, name, change, dtype="bf16"):
    """A checkpoint of the model in which one tensor was changed."""
    tensors = dict(tensors_of(model, dtype))
    tensors[name] = change(tensors[name].clone())
    return write(path, tensors, config_of(model))


def flipped(*position):
    """Flip the lowest bit of one element."""

    def change(tensor):
        tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])[position] ^= 1
        return tensor

    return change


def test_equal_checkpoints_of_both_kinds(capsys, pair):
    source, sharded = pair
    for a, b in ((source, sharded), (sharded, source), (sharded, sharded / "checkpoints/step-00000000")):
        code, lines, report = verify(capsys, a, b)
        assert code == 0 and report["equal"] and report["differing"] == 0
        count = report["tensors"]
        assert lines[0] == f"tensors: {count:,} of {count:,} are equal bit for bit"
        assert lines[1].startswith("logits: equal on 64 tokens drawn from the vocabulary (neither has a tokenizer)")
        assert lines == report["lines"] and len(lines) == 2


# rows of the keys of the second group lie below its two queries: (4 + 2) / 2 heads of 16 rows per group, and then 32
PLACES = [
    (
        "tiny-dense",
        "model.transformer.wte.weight",
        (200, 5),
        "embedding.word_embeddings.weight rows 200 to 249",
        (200, 5),
    ),
    ("tiny-dense", "model.transformer.blocks.1.k_proj.weight", (17, 3), "1.self_attention.linear_qkv.weight", (97, 3)),
    ("tiny-moe", EXPERT + "5.down_proj.weight", (3, 7), "2.mlp.experts.experts.linear_fc2.weight[5]", (5, 3, 7)),
    (
        "tiny-moe",
        EXPERT + "0.up_proj.weight",
        (1, 2),
        "2.mlp.experts.experts.linear_fc1.weight[0] rows 0 to 49",
        (0, 33, 2),
    ),
    ("tiny-moe", "model.layers.1.mlp.gate.expert_bias", (6,), "1.mlp.router.expert_bias", (6,)),
    ("tiny-moe-softmax", "model.norm.weight", (63,), "decoder.final_layernorm.weight", (63,)),
]


@pytest.mark.parametrize(("model", "name", "flip", "unit", "position"), PLACES)
def test_one_bit(capsys, root, tmp_path, monkeypatch, model, name, flip, unit, position):
    monkeypatch.setattr(canonical, "BLOCK_ELEMENTS", 64 * 50)
    before = tensors_of(model)[name]
    other = altered(tmp_path / "other", model, name, flipped(*flip))
    after = flipped(*flip)(before.clone())
    unit = f"decoder.layers.{unit}" if unit[0].isdigit() else unit
    code, lines, report = verify(capsys, written(tmp_path / "source", model), other, "--no-logits")
    assert code == 1 and not report["equal"] and report["differing"] == 1
    assert lines[0].startswith(f"tensors: {report['tensors'] - 1:,} of {report['tensors']:,} are equal")
    values = f"{float(before[flip]):.9g} and {float(after[flip]):.9g}"
    apart = float((before.double() - after.double()).abs().max())
    assert lines[1] == f"first difference: {unit} at {list(position)}: {values}; largest {apart:.3g}"


def test_the_first_differences_in_the_order_of_the_forward_pass(capsys, root, tmp_path):
    tensors = {name: value + (name.startswith("model.layers.2")) for name, value in tensors_of("tiny-dense").items()}
    tensors |= {name: value + 1 for name, value in tensors.items() if ".ff_" in name}
    tensors["model.transformer.blocks.3.attn_norm.weight"] *= torch.nan
    other = write(tmp_path / "other", tensors, config_of("tiny-dense"))
    code, lines, report = verify(capsys, other, written(tmp_path / "source", "tiny-dense"), "--no-logits")
    assert code == 1 and report["differing"] == 4 * 3 + 1 + 1 and len(lines) == 1 + 5 + 1
    found = [re.search(r"(first difference|then): (\S+)", line).groups() for line in lines[1:-1]]
    layer = "decoder.layers.{}."
    assert found == [
        ("first difference", layer.format(0) + "pre_mlp_layernorm.weight"),
        ("then", layer.format(0) + "mlp.linear_fc1.weight"),
        ("then", layer.format(0) + "mlp.linear_fc2.weight"),
        ("then", layer.format(1) + "pre_mlp_layernorm.weight"),
        ("then", layer.format(1) + "mlp.linear_fc1.weight"),
    ]


def test_bits_count_and_not_values(capsys, tmp_path):
    zero, name = written(tmp_path / "zero", "tiny-dense"), "model.transformer.ln_f.weight"
    one = altered(tmp_path / "one", "tiny-dense", name, lambda tensor: tensor * 0)
    other = altered(tmp_path / "other", "tiny-dense", name, lambda tensor: tensor * 0 * -1)
    _, lines, _ = verify(capsys, one, other, "--no-logits")
    assert lines[1].endswith("at [0]: 0 and -0; largest 0") or lines[1].endswith("and 0; largest 0")
    nan = altered(tmp_path / "nan", "tiny-dense", name, lambda tensor: tensor * torch.nan)
    code, lines, _ = verify(capsys, nan, nan, "--no-logits")
    assert (
        code == 1 and lines[0].endswith("are equal bit for bit") and "not every weight is a finite number" in lines[1]
    )
    code, lines, _ = verify(capsys, nan, zero, "--no-logits", "--tolerance", "1000")
    assert code == 1 and "at [0]: nan and " in lines[1]


def test_tolerance_and_dtypes(capsys, tmp_path):
    full, half = written(tmp_path / "full", "tiny-moe", "fp32"), written(tmp_path / "half", "tiny-moe", "bf16")
    code, lines, report = verify(capsys, full, half, "--no-logits")
    assert code == 1 and "embedding.word_embeddings.weight (torch.float32 and torch.bfloat16) at [0, 0]: " in lines[1]
    assert report["tensors"] - report["differing"] == 3  # the biases, in float32 in both
    code, lines, report = verify(capsys, full, half, "--no-logits", "--tolerance", "0.01")
    assert code == 0 and lines[0].endswith("are equal within 0.01 (3 bit for bit)") and report["identical"] == 3
    assert verify(capsys, full, half, "--no-logits", "--tolerance", "1e-5")[0] == 1


def test_other_architectures(capsys, root, tmp_path):
    other = load_model("tiny-moe", ["num_layers=3", "moe.routed_scaling_factor=2", "rope_theta=1000", "init_std=0.5"])
    source = written(tmp_path / "source", "tiny-moe")
    other = write(tmp_path / "other", tensors_of(other), config_of(other))
    code, _, report = verify(capsys, source, other)
    assert code == 1 and "hold different models: num_layers: 4 and 3; " in report["error"]
    assert (
        "moe.routed_scaling_factor: 2.5 and 2" in report["error"]
        and "rope_theta" in report["error"]
        and "init" not in report["error"]
    )


def test_a_checkpoint_that_is_not_whole(capsys, tmp_path):
    tensors = dict(tensors_of("tiny-dense"))
    del tensors["model.transformer.ln_f.weight"]
    broken = write(tmp_path / "broken", tensors, config_of("tiny-dense"))
    for words in ((broken, written(tmp_path / "source", "tiny-dense")), (tmp_path / "source", broken)):
        code, _, report = verify(capsys, *words)
        assert code == 1 and "broken does not hold" in report["error"]
        assert "1 tensor is missing: model.transformer.ln_f.weight" in report["error"]


# --- parts of it ----------------------------------------------------------------------------------------------

VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.25, 1.5, 3.0, math.inf, -math.inf, math.nan])
TENSOR = canonical.Unit(canonical.Weight(canonical.FINAL_NORM, None, 0, (12,)), None, 0, 12)


@given(
    st.lists(VALUES, min_size=12, max_size=12),
    st.lists(VALUES, min_size=12, max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.integers(1, 13),
)
def test_a_tensor_in_chunks(a, b, take, tolerance, chunk):
    b = [y if other else x for x, y, other in zip(a, b, take, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier, "_CHUNK", chunk)
        one, other = torch.tensor(a), torch.tensor(b)
        found = verifier.difference(one, other.bfloat16(), TENSOR, tolerance)
        same = verifier.difference(one, other, TENSOR, tolerance)
    unequal = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if repr(x) != repr(y)]
    beyond = [i for i in unequal if tolerance == 0 or not abs(a[i] - b[i]) <= tolerance]
    assert (same is None) == (not unequal)
    if same:
        first = (beyond or unequal)[0]
        assert same.tolerated == (not beyond) and same.position == (first,)
        assert repr(same.values) == repr((a[first], b[first]))
        apart = [abs(a[i] - b[i]) for i in unequal]
        largest = math.nan if any(math.isnan(each) for each in apart) else max(apart)
        assert repr(same.largest) == repr(largest)
    assert found is not None and found.dtypes == (torch.float32, torch.bfloat16)
    assert found.tolerated == (tolerance > 0 and not beyond)


@pytest.mark.alone
def test_an_interruption_ends_the_comparison(tmp_path, monkeypatch):
    source = open_source(written(tmp_path / "source", "tiny-moe"))
    met = []

    def slow(a, b, unit, tolerance):
        met.append(unit)
        time.sleep(0.05)

    monkeypatch.setattr(verifier, "compare_unit", slow)

    def interrupted(count):
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(verifier.differences(source, source, 0, 2, interrupted))
    assert time.monotonic() - begin < 0.4 and len(met) <= 4


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_progress_counts_every_byte_of_both(capsys, tmp_path, monkeypatch, name):
    shown = {}

    @contextlib.contextmanager
    def bar(title, total):
        shown[title] = [total, 0]
        yield lambda count: shown[title].__setitem__(1, shown[title][1] + count)

    for module in (verifier, logits):
        monkeypatch.setattr(module, "progress_bar", bar)
    full, half = written(tmp_path / "full", name, "fp32"), written(tmp_path / "half", name)
    assert verify(capsys, full, half, "--tolerance", "1")[0] == 0
    size = sum(value.nbytes for dtype in ("fp32", "bf16") for value in tensors_of(name, dtype).values())
    assert shown == {"comparing": [size, size], "logits": [size, size]}


# --- logits ---------------------------------------------------------------------------------------------------


def test_logits_on_text_say_where_they_part(capsys, tmp_path):
    source = with_tokenizer(written(tmp_path / "source", "tiny-dense", "fp32"))
    to_sharded(source, tmp_path / "sharded")
    (tmp_path / "text").write_text("best of times , the age of wisdom was the")
    code, lines, _ = verify(capsys, tmp_path / "sharded", source, "--text", str(tmp_path / "text"))
    assert code == 0 and lines[1].startswith("logits: equal on 10 tokens of text")
    # the embedding of "wisdom" is met at position 7 first, and attention carries it to all others
    row = WORDS.split().index("wisdom") + 4
    name = "model.transformer.wte.weight"
    other = altered(tmp_path / "other", "tiny-dense", name, lambda t: t.index_fill(0, torch.tensor(row), 0.5), "fp32")
    code, lines, _ = verify(capsys, source, other, "--text", str(tmp_path / "text"))
    assert code == 1 and lines[1].startswith(f"first difference: {canonical.EMBEDDING} at [{row}, 0]")
    assert re.match(
        r"logits: on 10 tokens of text they differ by up to \S+, first at position 0 \(token 7, by", lines[-1]
    )
    # nothing in the default text has this token
    other = altered(tmp_path / "unmet", "tiny-dense", name, lambda t: t.index_fill(0, torch.tensor(250), 0.5), "fp32")
    code, lines, _ = verify(capsys, source, other)
    assert code == 1 and re.match(r"logits: equal on \d+ tokens of text", lines[-1])


def test_logits_in_the_report(capsys, tmp_path):
    full, half = written(tmp_path / "full", "tiny-dense", "fp32"), written(tmp_path / "half", "tiny-dense", "bf16")
    code, lines, report = verify(capsys, full, full)
    found = report["logits"]
    assert code == 0 and found["compared"] and found["equal"] and found["largest"] == 0 and found["reach"] > 0.1
    assert found["first_position"] is None and found["on"] in lines[1]
    # rounded weights give other logits, which is what a tolerance is for
    code, lines, report = verify(capsys, full, half, "--tolerance", "0.002")
    found = report["logits"]
    assert code == 0 and report["equal"] and not found["equal"] and found["largest"] > 0.002
    assert found["first_position"] == 0 and f"by up to {found['largest']:.3g}, first at position 0" in lines[1]
    assert lines[2] == "equal within the tolerance for tensors, by which this is judged; the logits are not"
    code, lines, report = verify(capsys, full, half)
    assert code == 1 and not report["equal"] and not report["logits"]["equal"] and "they differ" in lines[-1]
    assert verify(capsys, full, half, "--no-logits")[2]["logits"] is None


@pytest.mark.parametrize("tolerance", ["0", "0.001"])
def test_equal_tensors_with_other_logits_are_not_equal(capsys, tmp_path, monkeypatch, tolerance):
    source = written(tmp_path / "source", "tiny-dense")
    known = logits.logits
    added = iter((0.0, 0.5))
    monkeypatch.setattr(logits, "logits", lambda *args: known(*args) + next(added))
    code, lines, report = verify(capsys, source, source, "--tolerance", tolerance)
    assert code == 1 and not report["equal"] and report["differing"] == 0
    assert report["logits"]["largest"] == pytest.approx(0.5, abs=1e-3)
    assert lines[-1] == "not equal: the same tensors give other logits"


def test_logits_that_are_no_numbers_are_json(capsys, tmp_path):
    name = "model.transformer.ln_f.weight"
    nan = altered(tmp_path / "nan", "tiny-dense", name, lambda tensor: tensor * torch.nan)
    for other in (nan, written(tmp_path / "source", "tiny-dense")):
        code, lines, report = verify(capsys, nan, other)
        assert code == 1 and not report["equal"] and report["logits"]["equal"] is False
        assert report["logits"]["largest"] is None and set(report["logits"]["not_finite"]) == {str(nan)}
        assert "not every one is a finite number, first at position 0" in lines[-1] and lines[-1].endswith(f" in {nan}")
        assert "NaN" not in json.dumps(report)


def test_finite_weights_whose_logits_are_not(capsys, tmp_path):
    tensors = dict(tensors_of("tiny-dense", "fp32"))
    tensors |= {
        name: tensors[name] * 1e38 for name in ("model.transformer.ln_f.weight", "model.transformer.ff_out.weight")
    }
    large = write(tmp_path / "large", tensors, config_of("tiny-dense"))
    code, lines, report = verify(capsys, large, large)
    assert code == 1 and report["not_finite"] == [] and report["differing"] == 0
    assert "not every one is a finite number" in lines[-1]


def test_a_tokenizer_of_another_model_is_not_used(capsys, tmp_path):
    source = with_tokenizer(written(tmp_path / "source", "tiny-dense"), " ".join(map(str, range(300))) + " the was of")
    other = written(tmp_path / "other", "tiny-dense")
    ways = [f"(the tokenizer of {source} gives id 306, beyond the vocabulary of 256)"]
    (tmp_path / "text").write_text("299 298")
    for words in ((source, source), (source, other), (other, source)):
        code, lines, report = verify(capsys, *words)
        assert code == 0 and f"64 tokens drawn from the vocabulary {ways[0]}" in lines[1]
        assert report["logits"]["on"] in lines[1]
    (other / "tokenizer.json").write_text("{}")
    _, lines, _ = verify(capsys, source, other, "--text", str(tmp_path / "text"))
    assert (
        "vocabulary, not of --text, (the tokenizer of " in lines[1] and "; the tokenizer cannot be used: " in lines[1]
    )
    assert str(other) in lines[1]
    (tmp_path / "text").write_text(" ")
    _, lines, _ = verify(capsys, with_tokenizer(other), other, "--text", str(tmp_path / "text"))
    assert "finds no token in the text)" in lines[1]


def test_text_that_is_none(capsys, tmp_path):
    source = written(tmp_path / "source", "tiny-dense")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("absent", "absent: cannot be read (No such file or directory); name a file of text"),
        ("binary", "binary: not UTF-8 text"),
    ):
        code, lines, report = verify(capsys, source, source, "--text", str(tmp_path / name))
        assert code == 1 and message in report["error"] and "--text" in lines[-1] and "defect" not in lines[-1]


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-1"])
def test_a_tolerance_that_is_none(capsys, tmp_path, tolerance):
    code, _, report = verify(capsys, tmp_path, tmp_path, "--tolerance", tolerance)
    assert code == 2 and report["error"] == f"--tolerance {float(tolerance)}: a number, 0 or more"


def test_a_model_that_does_not_fit_in_memory(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(logits.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    source = written(tmp_path / "source", "tiny-dense")
    code, lines, report = verify(capsys, source, source)
    assert code == 0 and report["equal"] and report["logits"]["equal"] is None
    assert report["logits"]["compared"] is False and report["logits"]["not_compared"] in lines[1]
    assert lines[1] == "logits: not compared: in float32 the model takes 0.0 GB and 0.0 GB of memory are free"
