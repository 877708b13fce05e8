"""Checkpoints that the tests of this folder share; none of them changes one."""

import pytest

from tests.launch.sampling.checkpoints import checkpoint


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A bidirectional model without experts, with a tokenizer."""
    return checkpoint(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="session")
def causal(tmp_path_factory):
    """A block-causal model (blocks of 32) with experts."""
    return checkpoint(tmp_path_factory.mktemp("causal"), "tiny-moe")


@pytest.fixture(scope="session")
def mute(tmp_path_factory):
    """A model without a tokenizer."""
    return checkpoint(tmp_path_factory.mktemp("mute"), tokenizer=False)
