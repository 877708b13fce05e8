"""Checkpoints that a test may damage."""

import shutil

import pytest

from tests.tools.convert.checkpoints import to_sharded, written


@pytest.fixture
def source(tmp_path):
    """A LLaDA-MoE of three files with an index."""
    return written(tmp_path / "source", "tiny-moe-softmax", files=3)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    root = tmp_path_factory.mktemp("imported")
    to_sharded(written(root / "source", "tiny-moe-softmax"), root / "sharded", "expert_parallel=2")
    return root / "sharded"


@pytest.fixture
def sharded(imported, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(imported, tmp_path / "sharded")
