"""`llada watch`: the final text, a line per step, and a page that needs nothing else."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from llada_megatron import Prompt, Sampler
from llada_megatron.launch.sampling.display import MASK, Recording, Screen, colour_of, coloured
from llada_megatron.parallel.sampling.sequence_view import Cell, SequenceView
from tests.launch.sampling.checkpoints import run_cli


def recorded(page: str) -> dict:
    return json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])


def replayed(data: dict) -> list[str]:
    """The text after the last step, as the page's script makes it."""
    cells = [[piece, token, 0] for piece, token, _ in data["start"]]
    for step in data["steps"]:
        for position, piece, token, _, _, ended in step:
            cells[position] = [piece, token, ended]
    assert all(token is not None for _, token, ended in cells if not ended)
    return "".join(piece for piece, _, ended in cells if not ended)


class References(HTMLParser):
    """What a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("link", "img", "iframe", "base", "object", "embed")


def test_the_page_has_every_step_and_loads_nothing(dense, tmp_path, capsys):
    page = tmp_path / "steps.html"
    arguments = ["--prompt", "a </script> ü", "--max-new-tokens", 20, "--schedule", "threshold", "--html", page]
    code, out, err = run_cli(capsys, "watch", dense, *arguments)
    assert code == 0
    reported = re.findall(r"^step (\d+): (\d+) written", err, re.MULTILINE)
    html = page.read_text("utf-8")
    data = recorded(html)
    assert len(data["steps"]) == len(reported) > 0
    for (_, count), step, number in zip(reported, data["steps"], range(1, 100), strict=False):
        assert sum(entry[4] == number and entry[2] is not None for entry in step) == int(count)
    assert replayed(data).replace("<|endoftext|>", "") == out[:-1]
    references = References()
    references.feed(html)
    assert references.found == []
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    assert html.count("</script>") == 1


def test_the_steps_as_json(dense, capsys):
    code, out, _ = run_cli(capsys, "watch", dense, "--infill", "--prompt", "a<mask:3>b<mask>", "--json")
    assert code == 0
    values = json.loads(out)
    written = [one for step in values["steps"] for one in step]
    assert sorted(one["position"] for one in written) == [1, 2, 3, 5]
    tokens = {one["position"]: one["token"] for one in written}
    assert [tokens[i] for i in (1, 2, 3, 5)] == [token for run in values["result"]["written"] for token in run]


@pytest.mark.parametrize("editor", [None, "wino"])
def test_a_view_follows_every_step(dense, editor):
    with Sampler.open(dense, schedule="threshold", editor=editor, block_length=8) as sampler:
        jobs = sampler.jobs(Prompt.with_gaps("€<mask:12>ü"))
        view = SequenceView.of(jobs[0].request, sampler.tokenizer)
        recording = Recording(view)
        assert view.masked == 12
        for step in sampler.steps_of(jobs):
            recording.add(view.apply(step))
            assert view.masked + view.written == 12
    assert view.masked == 0
    shown = "".join(cell.piece for cell in view.cells)
    assert shown.startswith("€") and shown.endswith("ü")
    assert replayed(recorded(recording.html({}))) == shown


def test_on_a_terminal_masks_disappear(dense):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=40, height=8)
    with Sampler.open(dense) as sampler, Screen(console) as screen:
        jobs = sampler.jobs("abc", max_new_tokens=6)
        view = SequenceView.of(jobs[0].request, sampler.tokenizer)
        for step in sampler.steps_of(jobs):
            view.apply(step)
            screen.show(view, step.number, f"step {step.number}")
            assert coloured(view.cells).plain.count(MASK) == view.masked
    assert "abc" in stream.getvalue()
    assert "step 1" in stream.getvalue()


def test_a_long_text_shows_where_it_is_written(dense):
    console = Console(file=io.StringIO(), force_terminal=True, width=20, height=8)
    with Sampler.open(dense) as sampler, Screen(console) as screen:
        jobs = sampler.jobs("\n".join("line" for _ in range(20)) + "END", max_new_tokens=2)
        view = SequenceView.of(jobs[0].request, sampler.tokenizer)
        for step in sampler.steps_of(jobs):
            view.apply(step)
            screen.show(view, step.number, "")
    assert "END" in console.file.getvalue()


def test_what_a_model_writes_moves_no_cursor():
    cells = [Cell(True, 1, "a\x1b[2J\n"), Cell(False, 2, "\r\tb", 0.5, 1)]
    assert coloured(cells).plain == "a␛[2J\n␍\tb"
    assert coloured([Cell(True, 1, "\x7f\x9b2J")]).plain == "␡\ufffd2J"


def test_no_token_ends_the_script_of_the_page(dense):
    pieces = ["</script><script>alert(1)</script>", "<!--", "\u2028\u2029", "\ud800", "/*DATA*/", "\\", '"']
    with Sampler.open(dense) as sampler:
        view = SequenceView(sampler.tokenizer, [Cell(True, 1, piece) for piece in pieces])
    html = Recording(view).html({"checkpoint": "</script>"})
    script = html.split("<script>")[1].split("</script>")[0]
    assert "go(last);" in script
    assert [cell[0] for cell in recorded(html)["start"]] == pieces
    assert script.partition("const data = ")[2].partition("\n")[0].isascii()


def test_colours():
    assert [colour_of(p) for p in (0.0, 0.5, 0.8, 0.95, 1.0)] == ["red", "dark_orange", "yellow", "green", "green"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--pause", "-1"], "--pause -1"),
        (["--pause", "nan"], "--pause nan"),
        (["--pause", "inf"], "--pause inf"),
        (["layout.tensor_parallel=2"], "runs in one process"),
        (["--html", "nowhere/page.html"], "give a file in a folder that there is"),
        (["--html", "."], "--html .: give a file"),
        (["--file", "x"], "one text is watched at a time"),
        (["--preset", "quick"], "no preset 'quick'"),
    ],
)
def test_wrong_input(dense, capsys, arguments, text):
    code, out, err = run_cli(capsys, "watch", dense, "--prompt", "a", *arguments)
    assert code == 2
    assert text in err
    assert out == ""


def test_the_page_does_not_replace_the_text(dense, tmp_path, capsys):
    text = tmp_path / "text.html"
    text.write_text("a text")
    code, _, err = run_cli(capsys, "watch", dense, "--file", text, "--html", text)
    assert code == 2 and "--html" in err and "this command reads" in err
    assert text.read_text() == "a text"
