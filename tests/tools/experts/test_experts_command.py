"""`llada experts`: a model with a known dead expert is profiled, shown, compared and advised, also over ranks."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llada_megatron import cli
from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.load_colours import colours
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.llada_moe.planning.expert_loads import read_loads
from llada_megatron.pages.heatmaps import relative
from llada_megatron.tools.experts import profiling
from llada_megatron.tools.experts.expert_trial import Trial
from llada_megatron.tools.experts.profile_reading import reading
from tests.browser import shown
from tests.chats import MASK, random_chats, write_chats
from tests.tools.convert.checkpoints import WORDS, config_of, tensors_of, to_sharded, with_tokenizer, write

DEAD_LAYER, DEAD_EXPERT = 3, 5
TINY = load_model("tiny-moe")
MODEL = dataclasses.replace(
    TINY, moe=dataclasses.replace(TINY.moe, num_expert_groups=1, expert_groups_top_k=1, top_k=2)
)
TOKENS, LENGTH, RATIOS = 512, 64, "0.2,0.8"
ROWS = 2 * TOKENS


def tensors(model, seed=0):
    """Weights whose router of one layer never chooses one expert."""
    found = dict(tensors_of(model, "fp32", seed))
    name = next(name for name in found if name.endswith("expert_bias") and f".{DEAD_LAYER - 1}." in name)
    found[name] = found[name].clone().zero_()
    found[name][DEAD_EXPERT] = -1.5
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Hugging Face directory, the same imported, and a text."""
    root = tmp_path_factory.mktemp("experts")
    with_tokenizer(write(root / "hf", tensors(MODEL), config_of(MODEL)))
    to_sharded(root / "hf", root / "run")
    words = random.Random(0)
    for name in ("a", "b"):
        lines = [" ".join(words.choices(WORDS.split(), k=50)) for _ in range(12)]
        (root / f"{name}.txt").write_text("\n".join(lines))
    return root


def experts(capsys, made, checkpoint, *options):
    sizes = ["--data", str(made / "a.txt"), "--tokens", str(TOKENS), "--length", str(LENGTH), "--ratios", RATIOS]
    code = cli.main(["experts", str(checkpoint), *sizes, *options, "--json"])
    printed = capsys.readouterr()
    return code, json.loads(printed.out.splitlines()[-1]), printed


def test_the_profile_finds_the_dead_expert_and_counts_every_token(capsys, made, tmp_path):
    more = ["--data", str(made / "b.txt"), "--output", str(tmp_path / "out"), "--block", "16"]
    code, profile, printed = experts(capsys, made, made / "run", *more)
    assert code == 0
    for facts in profile["layers"].values():
        assert sum(facts["tokens"]) == ROWS * MODEL.moe.top_k
    assert profile["layers"][str(DEAD_LAYER)]["tokens"][DEAD_EXPERT] == 0
    assert re.search(rf"no token of this text \(.*layer {DEAD_LAYER}: [\d, ]*\b{DEAD_EXPERT}\b", printed.out)
    assert [profile["by"][key]["rows"] for key in ("mask_ratio", "source")] == [[512, 512], [512, 512]]
    masked = dict(zip(profile["by"]["token_class"]["names"], profile["by"]["token_class"]["rows"], strict=True))
    assert masked["masked"] == 8 * (round(0.2 * LENGTH) + round(0.8 * LENGTH)) and sum(masked.values()) == ROWS
    for by in profile["by"].values():
        for layer, counts in by["tokens"].items():
            assert [sum(column) for column in zip(*counts, strict=True)] == profile["layers"][layer]["tokens"]
    text = (tmp_path / "out" / "page.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http" not in text
    stored = json.loads(re.search(r'id="profile">(.*?)</script>', text, re.S)[1])
    assert stored == json.loads((tmp_path / "out" / "profile.json").read_text()) == profile
    image = Image.open(io.BytesIO((tmp_path / "out" / "load.png").read_bytes()))
    row = list(profile["layers"]).index(str(DEAD_LAYER))
    cell = image.width // profile["experts"]
    assert image.height == cell * len(profile["layers"])
    assert image.getpixel((DEAD_EXPERT * cell, row * cell)) == (255, 255, 255)
    assert_shown(tmp_path / "out" / "page.html", tmp_path / "picture.png", profile)


SEEN = """<pre id="seen"></pre><script>addEventListener("load", () => {
  const images = [...document.images], box = images[0].getBoundingClientRect();
  const rows = [...document.querySelectorAll("#layers tbody tr")];
  const cells = rows.map(row => [...row.cells].map(cell => cell.innerText));
  const fits = document.documentElement.scrollWidth <= document.documentElement.clientWidth;
  const reading = [...document.querySelectorAll("#reading li")].map(item => item.innerText);
  document.getElementById("seen").textContent = JSON.stringify({
    loaded: images.map(image => image.naturalWidth), box: [box.x, box.y, box.width, box.height], cells, fits, reading});
})</script>"""


def assert_shown(page, picture, profile):
    """A browser shows the table's values, all images, and every cell of the heatmap in its colour."""
    copy = page.with_name("seen.html")
    copy.write_text(page.read_text("utf-8").replace("</body>", SEEN + "</body>"), "utf-8")
    seen = json.loads(
        html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', shown(copy, picture, 1000, 1600), re.S)[1])
    )
    assert seen["loaded"] and all(seen["loaded"]) and seen["fits"]
    assert seen["reading"] == reading(profile)
    layers = profile["layers"]
    assert [cells[:2] for cells in seen["cells"]] == [
        [layer, f"{facts['max_over_mean']:.2f}"] for layer, facts in layers.items()
    ]
    assert [int(cells[4]) for cells in seen["cells"]] == [facts["dead"] for facts in layers.values()]
    expected = colours(relative(np.array([facts["tokens"] for facts in layers.values()])))
    left, top, width, height = seen["box"]
    image = Image.open(picture).convert("RGB")
    for row, column in np.ndindex(expected.shape[:2]):
        x = left + (column + 0.5) * width / expected.shape[1]
        y = top + (row + 0.5) * height / expected.shape[0]
        assert image.getpixel((int(x), int(y))) == tuple(expected[row, column])


def test_a_hugging_face_directory_is_imported_on_the_way_and_equals_the_import(capsys, made):
    _, ours, _ = experts(capsys, made, made / "run")
    code, profile, _ = experts(capsys, made, made / "hf", "--compare", str(made / "run"))
    assert code == 0 and profile["layers"] == ours["layers"]
    assert all(change["differ"] == 0 for change in profile["change"]["layers"].values())


def test_another_checkpoint_of_the_model_is_routed_otherwise(capsys, made, tmp_path):
    with_tokenizer(write(tmp_path / "other", tensors(MODEL, seed=1), config_of(MODEL)))
    code, profile, printed = experts(capsys, made, made / "run", "--compare", str(tmp_path / "other"))
    assert code == 0 and all(change["differ"] > 0.5 for change in profile["change"]["layers"].values())
    assert "pairs have another set of experts" in printed.out


def test_a_checkpoint_without_masks_is_compared_on_unmasked_text(capsys, made, tmp_path):
    causal = with_tokenizer(write(tmp_path / "causal", tensors(MODEL), config_of(MODEL)))
    (causal / "generation_config.json").write_text('{"attention_pattern": "causal"}')
    code, found, _ = experts(capsys, made, made / "run", "--compare", str(causal))
    assert code == 2 and found["error"].endswith("both read the text unmasked with --ratios 0")
    code, profile, _ = experts(capsys, made, causal, "--compare", str(made / "run"))
    assert code == 0 and profile["rows"] == TOKENS  # at the one ratio that both can be read at
    assert all(0 < change["differ"] < 1 for change in list(profile["change"]["layers"].values())[1:])


def loaded(objective=None, model=MODEL, tokenizer=None):
    """What is known of a checkpoint before its model runs."""
    run = SimpleNamespace(model=model, objective=objective, training=None)
    return SimpleNamespace(run=run, metadata={"tokenizer": tokenizer})


def test_another_number_of_dense_layers_is_another_model():
    moe = dataclasses.replace(MODEL.moe, leading_dense_layers=2)
    other = loaded(model=dataclasses.replace(MODEL, moe=moe))
    with pytest.raises(ConfigError, match=r"--compare b: another model than a \(layers, leading dense layers"):
        profiling.compared(other, SimpleNamespace(compare="b", checkpoint="a"), [0.5], None, MODEL)


def test_passes_over_two_copies_of_the_text_are_not_compared():
    trained = loaded(objective=BlockDiffusionConfig(kind="block_diffusion", block_size=4))
    with pytest.raises(ConfigError, match=r"--passes: a was trained .* side by side \(kind block_diffusion\)"):
        profiling.reported(trained, SimpleNamespace(passes=True, checkpoint="a", data=[]), [0.5], [], None)


def test_a_set_of_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    args = SimpleNamespace(data=[str(write_chats(tmp_path / "set", random_chats(30, 0)))], tokens=32, length=8)
    model = dataclasses.replace(MODEL, mask_token_id=MASK)
    for tokenizer in (None, {"sha256": "0" * 64}):
        assert profiling._text(args, loaded(model=model, tokenizer=tokenizer), None).tokens == 32
    with pytest.raises(DataError, match=r"another tokenizer than the checkpoint's \(000000000000, not 111111111111\)"):
        profiling._text(args, loaded(model=model, tokenizer={"sha256": "1" * 64}), None)


def test_a_trial_says_how_far_its_gain_is_from_the_expected_one():
    assert Trial("x", before=2.0, expected=1.5, measured=1.6).gain_error == pytest.approx(0.2)
    assert Trial("x", before=1.5, expected=1.5, measured=1.6).gain_error is None


def test_sampling_and_training_route_alike_but_for_rounding(capsys, made):
    code, found, _ = experts(capsys, made, made / "run", "--passes")
    assert code == 0 and found["precision"] == "fp32"
    assert found["pairs"] == 3 * TOKENS and found["differ"] < 0.01
    assert all(0 <= layer["score_difference"] < 1e-4 for layer in found["layers"].values())
    assert all(layer["largest_gap"] < 2e-4 < layer["usual_gap"] for layer in found["layers"].values())


def test_a_difference_between_the_passes_is_seen(made):
    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
    from llada_megatron.parallel.evaluation.pass_agreement import pass_agreement

    with open_checkpoint(made / "run") as loaded:
        loaded.model.embedding.register_forward_hook(lambda module, _, out: out.roll(1, -1) if module.training else out)
        found = pass_agreement(loaded, np.random.default_rng(0).integers(4, 16, (2, LENGTH)))
    assert all(each.differ > 0 and each.score_difference > 0.01 for each in found.values())
    assert all(0 < each.largest_gap < 2 * each.score_difference for each in found.values())


def test_a_precision_can_be_asked_for(capsys, made):
    code, found, _ = experts(capsys, made, made / "run", "--passes", "--precision", "bf16")
    assert code == 0 and found["precision"] == "bf16" and found["differ"] < 0.3


def test_advice_for_several_numbers_of_ranks(capsys, made):
    code, found, printed = experts(capsys, made, made / "run", "--advise", "2,4")
    assert code == 0 and [row["ranks"] for row in found["ranks"]] == [2, 4]
    assert all(row["placed"]["lost"] < row["now"]["lost"] for row in found["ranks"])
    assert "--try placement=" in printed.out
    code, tried, printed = experts(capsys, made, made / "run", "--try", "placement=4")
    assert code == 0 and tried["expected"] < tried["before"] and tried["error"] < 0.1
    assert f"measured gain is {tried['gain_error']:.1%} from the expected gain" in printed.out


def test_ranks_tell_the_same_profile_as_one_process(capsys, made):
    _, alone, _ = experts(capsys, made, made / "run")
    code, found, _ = experts(capsys, made, made / "run", "--layout", "pipeline_parallel=2")
    assert code == 0
    for layer, facts in alone["layers"].items():
        assert found["layers"][layer]["tokens"] == pytest.approx(facts["tokens"], abs=0.01 * ROWS)
    assert found["by"].keys() == alone["by"].keys() and found["model"] == alone["model"]


def test_passes_are_compared_in_a_layout(capsys, made):
    layout = "tensor_parallel=2,expert_parallel=2"  # training runs with sequence parallelism, sampling without
    code, found, _ = experts(capsys, made, made / "run", "--layout", layout, "--passes")
    assert code == 0 and found["pairs"] == 3 * TOKENS and found["differ"] < 0.01
    assert all(layer["rows"] == TOKENS and layer["score_difference"] < 1e-4 for layer in found["layers"].values())


def test_the_planner_reads_a_profile_of_its_own_model_only(capsys, made, tmp_path):
    _, profile, _ = experts(capsys, made, made / "run", "--output", str(tmp_path))
    loads = read_loads(str(tmp_path / "profile.json"), MODEL)
    assert [list(layer) for layer in loads.tokens] == [[], *(facts["tokens"] for facts in profile["layers"].values())]
    assert profile["expert_ranks"].keys() == {"2", "4", "8"} and min(profile["expert_ranks"].values()) > 1
    with pytest.raises(ConfigError, match=r"of another model than the run's: moe.top_k 2, not 4"):
        read_loads(str(tmp_path / "profile.json"), TINY)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--tokens", "65536"], r"--data .*a.txt: 576 tokens in whole windows of 64, but --tokens 65536 takes .* 576"),
        (["--tokens", "8"], "--tokens 8: less than one window of 64"),
        (["--length", "4096"], "--length 4096: the model's max_sequence_length is 128"),
        (["--data", "nowhere"], "--data nowhere: neither a file or folder nor the prefix of a prepared set"),
        (["--ratios", "0.5,2"], "--ratios 0.5,2: each between 0 and 1"),
        (["--ratios", "half"], "--ratios half: numbers with commas"),
        (["--capacity", "9"], "--capacity 9: 2 .* to 8"),
        (["--advise", "1"], "--advise 1: numbers of ranks above 1"),
        (["--advise", "3"], "8 experts in 1 groups cannot be dealt out over 3 ranks"),
        (["--try", "prayer"], "--try prayer: placement=RANKS"),
        (["--try", "bias", "--layout", "tensor_parallel=2"], "--layout: --try changes the weights of a whole model"),
        (["--layout", "expert_parallel=3"], "--layout: layout.expert_parallel: 3 does not divide num_experts 8"),
        (["--passes", "--compare", "x"], "--compare: two checkpoints are compared by their profiles"),
        (["--passes", "--output", "x"], "--output: --passes and --advise write no files; --json"),
        (["--advise", "2", "--seed", "0"], "--seed: is for profiles, without --passes"),
        (["--passes", "--block", "8"], "--block: is for profiles"),
        (["--try", "bias", "--capacity", "4"], "--capacity: is for profiles"),
        (["--seed", "-1"], "--seed -1: at least 0"),
    ],
)
def test_wrong_input(capsys, made, options, problem):
    code, found, _ = experts(capsys, made, made / "run", *options)
    assert code in (1, 2) and re.search(problem, found["error"]), found["error"]


def test_a_dense_checkpoint_and_one_of_another_model(capsys, made, tmp_path):
    dense = load_model("tiny-dense")
    write(tmp_path / "dense", tensors_of(dense, "fp32"), config_of(dense))
    code, found, _ = experts(capsys, made, tmp_path / "dense")
    assert code == 2 and "holds a dense model (family llada): it has no experts" in found["error"]
    with_tokenizer(write(tmp_path / "groups", tensors_of(TINY, "fp32"), config_of(TINY)))
    code, found, _ = experts(capsys, made, made / "run", "--compare", str(tmp_path / "groups"))
    assert code == 2 and "another model" in found["error"]
    code, found, _ = experts(capsys, made, tmp_path / "groups", "--try", "bias")
    assert code == 2 and "not groups or blocks" in found["error"]
