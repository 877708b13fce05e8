"""The shape of the packages: imports run one way, the style holds, no generic name is installed at the top level."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GENERIC = {"tests", "benchmarks", "configs", "parallel", "launch", "tools", "llada_moe", "constraints", "docs"}


def _run(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_imports_run_one_way():
    done = _run(sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()")
    assert done.returncode == 0, done.stdout + done.stderr


def test_style():
    done = _run(sys.executable, "-m", "ruff", "check", ".")
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_one_import_package_is_packaged():
    from setuptools import find_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(*(str(ROOT / where) for where in settings["where"]))
    assert {name.split(".")[0] for name in packages} == {"llada_megatron"}


def test_generic_names_are_not_importable_from_an_installation(tmp_path):
    code = f"import importlib.util as u; print([n for n in {sorted(GENERIC)} if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_installed_files_stay_under_one_name():
    try:
        files = importlib.metadata.files("llada-megatron") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is on the path but not installed")
    tops = {file.parts[0] for file in files if ".." not in file.parts}
    assert not {top for top in tops if top.split(".")[0] in GENERIC}


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["train", "--help"], ["sample", "--help"]])
def test_help_imports_no_torch(command):
    code = (
        "import sys; from llada_megatron.cli import main\n"
        f"try: main({command})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'megatron', 'numpy', 'transformers', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = _run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


def test_text_is_read_without_megatron():
    """`llada prepare` reads text before it calls `parallel.device.install()`, which Megatron-Core has to come after."""
    code = "import sys; from llada_megatron.llada_moe.data import encoding; sys.exit('megatron.core' in sys.modules)"
    done = _run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "module", ["objectives", "objectives.interface", "config.parsing", "config.objective", "model.patterns"]
)
def test_a_room_that_others_stand_on_is_importable_first(module):
    done = _run(
        sys.executable, "-c", f"import sys, llada_megatron.llada_moe.{module}; sys.exit('torch' in sys.modules)"
    )
    assert done.returncode == 0, done.stderr
