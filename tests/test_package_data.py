"""A built package holds what it reads besides its own modules, and nothing of what only proves the project.

One wheel is built and installed, and a process that finds nothing else of this project looks into it.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from llada_megatron.llada_moe.huggingface.formats import FORMATS, modeling_files

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('built')"
FIND = """
import contextlib, io, json, sys
from llada_megatron import cli
from llada_megatron.launch.cluster.config import load_cluster
from llada_megatron.llada_moe.config import load_model, load_run

names = json.loads(sys.argv[1])
for name in names["models"]:
    load_model(name)
for name in names["clusters"]:
    load_cluster(name)
for name in names["recovery"]:
    load_run("small-diffusion", [f"recovery={name}"])
for name in names["runs"]:
    load_run(name)
with contextlib.redirect_stdout(io.StringIO()):
    codes = {name: cli.main(["inspect", name]) for name in [*names["models"], *names["runs"]]}
print(cli.__file__, set(codes.values()))
sys.exit(cli.main(["inspect", "qqqq"]))
"""


def test_every_exported_format_has_modelling_files():
    for table in FORMATS:
        if table.exports:
            names = [path.name for path in modeling_files(table.exports.folder)]
            for place in table.exports.constants["auto_map"].values():
                assert f"{place.split('.')[0]}.py" in names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    unbuilt = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, checkout / name, ignore=unbuilt, symlinks=True)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = (checkout / "built").glob("*.whl")
    return built


def test_a_wheel_holds_what_the_package_reads(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src/llada_megatron"
    expected = {path.relative_to(ROOT / "src").as_posix() for path in package.rglob("*.py")}
    for pattern in ("*.html", "*.j2"):
        expected |= {path.relative_to(ROOT / "src").as_posix() for path in package.rglob(pattern)}
    assert len({name for name in expected if "/modeling/" in name}) >= 6
    expected |= {f"llada_megatron/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len({name for name in expected if name.endswith(".yaml")}) >= 20
    expected.add("llada_megatron/py.typed")
    assert expected <= held, sorted(expected - held)


def test_a_wheel_holds_nothing_that_only_proves_the_project(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"llada_megatron"}


def test_an_installed_package_finds_its_configurations_by_name(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        installed,
        wheel,
    ]
    done = subprocess.run([str(word) for word in install], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kinds = ("models", "runs", "clusters", "recovery")
    names = {kind: sorted(path.stem for path in (ROOT / "configs" / kind).glob("*.yaml")) for kind in kinds}
    assert all(names.values())
    done = subprocess.run(
        [sys.executable, "-P", "-c", FIND, json.dumps(names)],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == f"{installed / 'llada_megatron/cli.py'} {{0}}\n"
    models, runs = (", ".join(names[kind]) for kind in ("models", "runs"))
    assert done.stderr == f"error: no model or run 'qqqq'; models: {models}; runs: {runs}\n"
