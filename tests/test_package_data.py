"""A built package holds the files that are not Python modules of it: modelling files of exports, pages, templates."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llada_megatron.llada_moe.huggingface.formats import FORMATS, modeling_files

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('built')"


def test_every_exported_format_has_modelling_files():
    for table in FORMATS:
        if table.exports:
            names = [path.name for path in modeling_files(table.exports.folder)]
            for place in table.exports.constants["auto_map"].values():
                assert f"{place.split('.')[0]}.py" in names


def test_a_wheel_holds_the_modelling_files(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    unbuilt = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=unbuilt)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "built").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src/llada_megatron"
    expected = {path.relative_to(ROOT / "src").as_posix() for path in package.rglob("*.py")}
    for pattern in ("*.html", "*.j2"):
        expected |= {path.relative_to(ROOT / "src").as_posix() for path in package.rglob(pattern)}
    assert len({name for name in expected if "/modeling/" in name}) >= 6
    assert expected <= held, sorted(expected - held)
