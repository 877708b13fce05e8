"""The page of a plan: whole, without anything from elsewhere, with the figures of the report, as a browser shows it."""

import re
from html.parser import HTMLParser

import pytest

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.planning.estimate import GIB, Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
from llada_megatron.tools.plan.page import COLOURS, ROW, WIDTH, page
from tests.browser import pixels, shown


class Titles(HTMLParser):
    def __init__(self):
        super().__init__()
        self.titles, self.inside = [], False

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "title"

    def handle_data(self, data):
        if self.inside:
            self.titles.append(data)
            self.inside = False


@pytest.fixture(scope="module")
def estimate():
    return Estimate(load_run("llada2-flash-pretrain"), load_gpu("h100"), Assumptions())


def assert_every_figure(text, estimate):
    reader = Titles()
    reader.feed(text)
    for stage in estimate.stages:
        for name, size in stage.parts.items():
            if size > 0:
                assert f"{name}: {size / GIB:.2f} GiB" in reader.titles
    for name, seconds in estimate.time.parts.items():
        assert f"{name}: {seconds:.3f} s" in reader.titles
    assert sum(re.fullmatch(r"forward \d+", title) is not None for title in reader.titles) == 4 * 12


def test_the_page_has_every_part_of_memory_and_time(estimate):
    text = page(estimate)
    assert_every_figure(text, estimate)
    assert "http" not in text and "<script" not in text


def test_a_browser_shows_it(estimate, tmp_path):
    file, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    file.write_text(page(estimate), "utf-8")
    assert_every_figure(shown(file, picture, 1000, 2400), estimate)
    seen = pixels(picture)
    scale = (WIDTH - 80) / (estimate.gpu.memory_gib * GIB)
    names = [name for name in estimate.stages[0].parts if any(stage.parts[name] > 0 for stage in estimate.stages)]
    for name in ("activations", "logits"):  # their colours are in no other picture
        area = sum(stage.parts[name] for stage in estimate.stages) * scale * (ROW - 4)
        colour = COLOURS[names.index(name)]
        assert seen[colour] == pytest.approx(area, rel=0.15), name  # less the white edges, and with the legend
