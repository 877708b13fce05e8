"""`llada eval report`: every figure with its protocol and error, what is missing said, read as a browser shows it."""

from __future__ import annotations

import html
import json
import math
import random
import re
from collections import Counter

import pytest

from llada_megatron.launch.evaluation.report.report_inputs import read_inputs
from llada_megatron.launch.evaluation.report.report_page import report_page
from llada_megatron.launch.evaluation.report.run_curves import MOST_POINTS, Curve
from llada_megatron.llada_moe.errors import DataError
from tests.browser import pixels, shown
from tests.launch.evaluation.report_sources import results, run_folder
from tests.launch.sampling.checkpoints import run_cli


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    run = run_folder(folder / "first")
    return folder, run, results(folder, run)


def report(capsys, page, *words):
    code, out, err = run_cli(capsys, "eval", "report", *words, "--output", page, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), page.read_text("utf-8")


def words_of(text):
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)))


def rows_of(text, name):
    table = re.search(rf'<table id="{name}">.*?<tbody>(.*?)</tbody>', text, re.S)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    return [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)] for row in rows]


def test_a_run_with_all_results(sources, tmp_path, capsys):
    _, run, files = sources
    told, text = report(capsys, tmp_path / "page.html", run, *files)
    assert [each["kind"] for each in told["files"]] == [
        "likelihood",
        "harness",
        "infill",
        "samples",
        "experts",
        "samplers",
    ]
    assert told["runs"] == [{"name": "first", "path": str(run)}]
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text and "<script" not in text
    assert rows_of(text, "runs") == [
        ["first", "llada_moe", "2 × 64", "4, 2 a token", "diffusion", "1,000 of 1,000", "1,024,000", "fp32", "data 2"]
    ]
    losses = {row[0]: row for row in rows_of(text, "summary-training")}
    assert losses["Training loss"][2:] == ["7.995 (step 1)", "3 (step 1,000)", "3 (step 1,000)", "999", "1"]
    bounds = {row[0]: row for row in rows_of(text, "summary-validation")}
    assert bounds["Held-out text"][2:5] == ["2.9 (step 100)", "2 (step 1,000)", "2 (step 1,000)"]
    tasks = {(row[1], row[2]): row for row in rows_of(text, "tasks")}
    protocol = "bound, 128 samples, 8 a stratum, seed 0, no guidance"
    assert tasks["scores.jsonl", "acc"] == [
        "first", "scores.jsonl", "acc", "0.7500 ± 0.2500", "4 questions", f"{protocol}; float32",
    ]  # fmt: skip
    assert tasks["scores.jsonl", "nats per token"][3:5] == ["2.0000 ± 0.1250", "1 text"]
    assert tasks["piqa", "acc"][3:5] == ["0.6250 ± 0.0312", "240 documents"]
    assert tasks["piqa", "acc"][5].startswith(f"5 shots; likelihood {protocol}; answers preset llada")
    assert tasks["piqa", "bleu"][3] == "not a number"
    spans = {(row[2], row[3]): row for row in rows_of(text, "infilling")}
    assert spans["this model", "8"][5:] == ["0.0625 ± 0.0300", "0.5000 ± 0.0200", "4.0000 ± 0.2000", "–", "–"]
    assert [row[:3] + row[5:6] for row in rows_of(text, "experts")] == [
        ["first", "1", "3.00", "2"], ["first", "2", "1.00", "0"], ["other", "1", "1.00", "0"],
    ]  # fmt: skip
    said = words_of(text)
    assert "first: loss is not a number in 1 line, first at step 7" in said
    assert "first: 1 broken line of metrics.jsonl left out" in said
    assert "groups of up to 4 values" in said
    assert "def f1 (<b>):" in said and "2 texts, 2 of them shown: 8 tokens in 4 forward passes" in said
    assert "No results of the reversal curse were given; llada eval reversal --output FOLDER, or --json write" in said
    assert rows_of(text, "samplers-0-aup") == [["quick", "2", "90"], ["poor", "1", "80"]]
    assert rows_of(text, "samplers-0-points") == [
        ["quick", "as published", "1", "0.9000 ± 0.0500", "published", "on the front"],
        ["quick", "schedule.threshold=0.5", "4", "0.5000 ± 0.1000", "", "on the front"],
        ["poor", "", "2", "0.4000 (no standard error)", "", ""],
    ]
    assert len(text) < 200_000


def test_runs_side_by_side_and_what_is_missing(sources, tmp_path, capsys):
    _, run, _ = sources
    (tmp_path / "second" / "first").mkdir(parents=True)
    (tmp_path / "second" / "first" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n')
    told, text = report(capsys, tmp_path / "page.html", run, tmp_path / "second" / "first", "--title", "Two <runs>")
    one, two = (each["name"] for each in told["runs"])
    assert one.endswith("/first") and two == "second/first" and one != two
    assert "<h1>Two &lt;runs&gt;</h1>" in text
    losses = [row[:3] for row in rows_of(text, "summary-training") if row[0] == "Training loss"]
    assert losses == [["Training loss", one, "7.995 (step 1)"], ["Training loss", two, "2.5 (step 1)"]]
    said = words_of(text)
    assert "second/first: there is no config.yaml" in said
    assert "second/first: loss is not a number in 1 line, first at step 2" in said
    assert "No results of tasks were given" in said and "No samples were given" in said
    assert "No figures of samplers were given; llada bench sample --output FILE.json" in said
    descriptions = re.findall(r"<desc[^>]*>(.*?)</desc>", text)
    assert descriptions[0].startswith(f"nats per token over step. {one}: 7.987 at 2.5, 3.005 at 999")


def test_files_alone_and_wrong_input(sources, tmp_path, capsys):
    _, run, files = sources
    _, text = report(capsys, tmp_path / "page.html", files[2])
    assert "No run's folder was given" in words_of(text) and rows_of(text, "infilling")
    (tmp_path / "odd.json").write_text('{"a": 1}')
    rows = [{"writer": "w", "length": 1, "exact": None, "spans": 1}, {"writer": "w", "length": 1}]
    (tmp_path / "short.json").write_text(json.dumps({"kind": "infill", "rows": rows}))
    (tmp_path / "broken.jsonl").write_text('{"number": 1, "forwards": 2}\n{"number"\n')
    for words, code, told in [
        ((tmp_path / "none",), 1, "No such file"),
        ((tmp_path,), 1, "not a run's folder (no metrics.jsonl, no config.yaml)"),
        ((tmp_path / "odd.json",), 1, "no result that a report can show. It shows likelihood: llada eval"),
        (
            (tmp_path / "short.json",),
            1,
            "entry 2 of infill lacks spans; write it again with llada eval infill --output",
        ),
        ((tmp_path / "broken.jsonl",), 1, "broken.jsonl, line 2: not JSON"),
        ((run / "metrics.jsonl",), 1, "belongs to a run; give its folder"),
        ((run, run), 2, "is given twice"),
        ((files[0], "--prompt", "a"), 2, "no run's folder was given"),
        ((run, "--output", run / "config.yaml"), 2, "name another place"),
        ((run, "--output", run), 2, "give a file in a folder that there is"),
    ]:
        output = () if "--output" in words else ("--output", tmp_path / "never.html")
        found, _, err = run_cli(capsys, "eval", "report", *words, *output)
        assert (found, told in err, err.count("\n")) == (code, True, 1), err
    assert not (tmp_path / "never.html").exists()


def changed(content, at, value):
    """The content with this value in the place that `at` leads to; `...` leaves the place out."""
    content = json.loads(json.dumps(content))
    holder = content
    for key in at[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return content


def places(content, before=()):
    """The way to every value within."""
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield (*before, key)
        yield from places(content[key], (*before, key))


def page_or_line(path, content):
    """What the report says about a file alone; every line of a `.jsonl` is one element of the content."""
    lines = content if path.suffix == ".jsonl" else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        return report_page("", read_inputs([str(path)]))
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return str(error)


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("speeds.json", ("task",), ...),
        ("speeds.json", ("counted",), ...),
        ("speeds.json", ("aup_formula",), ...),
        ("speeds.json", ("protocol",), ...),
        ("scores.jsonl", (1, "margin"), ...),
        ("scores.jsonl", (0, "protocol", "guidance"), "none"),
        ("harness.json", ("results",), [1]),
        ("samples.jsonl", (0, "forwards"), "two"),
        ("samples.jsonl", (0, "text"), 5),
        ("experts.json", ("layers", "1", "tokens"), {}),
    ],
)
def test_a_file_of_another_form_is_named_in_one_line(sources, tmp_path, name, at, value):
    content = [json.loads(line) for line in (sources[0] / name).read_text().splitlines()]
    whole = content if name.endswith(".jsonl") else content[0]
    if name == "harness.json":
        whole = {"parts": [whole], "rows": []}
        at = ("parts", 0, *at)
    told = page_or_line(tmp_path / name, changed(whole, at, value))
    assert told.startswith(f"{tmp_path / name}: not of the form that its command writes ("), told


def test_drawn_broken_files_give_a_page_or_one_line(sources, tmp_path):
    draws, seen = random.Random(0), Counter()
    for file in sources[2]:
        content = [json.loads(line) for line in file.read_text().splitlines()]
        whole = content if file.suffix == ".jsonl" else content[0]
        every = list(places(whole))
        for _ in range(20):
            value = draws.choice((..., None, [], {}, "<script>", -1, True, 10**400, [[]], {"a": None}, math.nan))
            told = page_or_line(tmp_path / file.name, changed(whole, draws.choice(every), value))
            assert "<script" not in told or told.startswith(str(tmp_path))
            seen[told.startswith("<!doctype html>")] += 1
    assert min(seen[True], seen[False]) > 15


def test_deeply_nested_json_is_named(sources, tmp_path):
    for name in ("deep.json", "deep.jsonl"):
        (tmp_path / name).write_text('{"a":' * 99999 + "1" + "}" * 99999 + "\n")
        with pytest.raises(DataError, match=f"{name}: not of the form .*RecursionError"):
            read_inputs([str(tmp_path / name)])
    (tmp_path / "protocol.json").write_text("[" * 99999 + "]" * 99999)
    with pytest.raises(DataError, match="not a run's folder"):
        read_inputs([str(tmp_path)])


def test_published_figures_beside_those_that_were_measured(tmp_path, capsys):
    part = {"protocol": {"shots": {"piqa": 0}}, "results": {"piqa": {"acc,none": 0.7}}, "samples": {"piqa": []}}
    row = {
        "task": "piqa",
        "figures": [73.6, 74.0],
        "measured": {"acc": 70.0},
        "errors": {"acc": 1.0},
        "accepted": False,
    }
    content = {"model": "LLaDA-8B", "source": "its paper", "rows": [row], "parts": [part, part]}
    (tmp_path / "published.json").write_text(json.dumps(content))
    _, text = report(capsys, tmp_path / "page.html", tmp_path / "published.json")
    assert rows_of(text, "published") == [["piqa", "73.6 or 74", "acc 70.0000 ± 1.0000", "rejected"]]
    assert [row[3] for row in rows_of(text, "tasks")] == ["0.7000 (no standard error)"] * 2
    assert "LLaDA-8B: published and measured, in percent" in text and "its paper" in text
    (tmp_path / "interrupted.json").write_text(json.dumps({"parts": [part]}))
    _, text = report(capsys, tmp_path / "page.html", tmp_path / "interrupted.json")
    assert [row[3] for row in rows_of(text, "tasks")] == ["0.7000 (no standard error)"]
    assert "published and measured" not in text


def test_the_reversal_curse_over_seeds(tmp_path, capsys):
    folder = tmp_path / "reversal"
    for seed, right in ((0, 2), (1, 1)):
        (folder / f"seed-{seed}").mkdir(parents=True)
        answers = [{"ask": "in place", "about": "name", "right": n < right} for n in range(2)]
        (folder / f"seed-{seed}" / "whole-names.json").write_text(json.dumps(answers))
    (folder / "protocol.json").write_text(json.dumps({"benchmark": "reversal", "pairs": 200}))
    claims = [{"claim": "AR at most 5 %", "value": 0.5, "unit": "%", "goal": "<= 5", "holds": True}]
    (tmp_path / "claims.json").write_text(json.dumps({"protocol": {"benchmark": "reversal"}, "claims": claims}))
    _, text = report(capsys, tmp_path / "page.html", folder, tmp_path / "claims.json")
    assert rows_of(text, "reversal") == [["whole names", "in place", "name", "0.7500 ± 0.2500", "2", "2"]]
    assert "AR at most 5 % 0.5 % <= 5 holds" in words_of(text)
    (folder / "seed-0" / "whole-names.json").write_text("[{}]")
    code, _, err = run_cli(capsys, "eval", "report", folder, "--output", tmp_path / "page.html")
    assert code == 1 and "whole-names.json: not the answers of a model" in err


def test_samples_made_for_the_report(sources, dense, tmp_path, capsys):
    _, run, _ = sources
    words = ("--prompt", "ab", "--prompt", "c", "--max-new-tokens", 3, "--seed", 5)
    _, text = report(capsys, tmp_path / "page.html", run, dense, *words)
    said = words_of(text)
    assert f"{dense.name}, for this report 2 texts, 2 of them shown: 6 tokens in 6 forward passes" in said
    assert "method schedule steps" in said and "max_new_tokens 3" in said and "seed 5" in said
    assert re.search(r"<pre>ab<mark>", text)
    assert re.search(r"first, for this report There are none: .*checkpoint", said)


def test_a_file_of_samples_puts_no_element_into_the_page(tmp_path, capsys):
    record = dict.fromkeys(("number", "text", "new"), "<script>1</script>") | {"forwards": 1, "new_tokens": 1}
    (tmp_path / "samples.json").write_text(json.dumps({"samples": [record]}))
    _, text = report(capsys, tmp_path / "page.html", tmp_path / "samples.json")
    assert "<script" not in text and "text &lt;script&gt;1&lt;/script&gt;: 1 tokens in 1 passes" in text


def test_a_long_curve_has_few_points_and_keeps_what_stands_out():
    curve = Curve()
    for step in range(5000):
        curve.add(step, 50.0 if step == 3141 else 1.0)
    marks = curve.marks
    assert MOST_POINTS / 2 <= len(marks) <= MOST_POINTS
    assert max(mark.high for mark in marks) == 50.0 and min(mark.low for mark in marks) == 1.0
    assert (curve.values, curve.first, curve.last) == (5000, (0, 1.0), (4999, 1.0))


SEEN = """<body style="margin:0"><pre id="seen"></pre><script>addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, style = getComputedStyle(page.body);
    return {
      charts: [...page.querySelectorAll(".chart > svg")].map(svg => svg.getBoundingClientRect().width),
      images: [...page.images].map(image => image.naturalWidth),
      fits: page.documentElement.scrollWidth <= page.documentElement.clientWidth,
      paper: style.backgroundColor, ink: style.color,
      alone: page.querySelectorAll("img:not([alt]), svg:not([aria-labelledby]):not([aria-hidden])").length,
    };
  });
  document.getElementById("seen").textContent = JSON.stringify(seen);
})</script>"""


def test_a_browser_shows_it_on_a_desk_and_dark_on_a_phone(sources, tmp_path, capsys):
    _, run, files = sources
    _, text = report(capsys, tmp_path / "page.html", run, *files)
    dark = text.replace("@media (prefers-color-scheme: dark)", "@media all")  # what a reader's system would choose
    frames = [
        f'<iframe style="border:0;width:{width}px;height:1000px" srcdoc="{html.escape(each)}"></iframe>'
        for width, each in ((1000, text), (360, dark))
    ]
    (tmp_path / "seen.html").write_text(SEEN + "".join(frames))
    page = shown(tmp_path / "seen.html", tmp_path / "picture.png", 1400, 1000)
    desk, phone = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', page, re.S)[1]))
    for seen, width in ((desk, 1000), (phone, 360)):
        assert seen["fits"] and seen["alone"] == 0
        assert len(seen["charts"]) == 9 and all(250 < each <= width for each in seen["charts"])
        assert len(seen["images"]) == 2 and all(seen["images"])
    assert (desk["paper"], desk["ink"]) == ("rgb(252, 252, 253)", "rgb(27, 27, 31)")
    assert (phone["paper"], phone["ink"]) == ("rgb(22, 22, 26)", "rgb(232, 232, 238)")
    seen = pixels(tmp_path / "picture.png")
    assert seen["#0064a8"] > 100 and seen["#5ab4f0"] > 100  # the lines of the first run, on light and on dark paper
