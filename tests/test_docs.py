"""The guides name every command, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

from llada_megatron.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"llada {name}" not in text] == []


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(guide):
    links = re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", guide.read_text())
    assert [link for link in links if not (guide.parent / link).exists()] == []
