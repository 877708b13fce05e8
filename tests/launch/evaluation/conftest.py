"""The checkpoint that the tests of this folder share; none of them changes it."""

import pytest

from tests.launch.sampling.checkpoints import checkpoint


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """A bidirectional model without experts, with a tokenizer of bytes."""
    return checkpoint(tmp_path_factory.mktemp("dense"))
