"""A world of this process for models that tests evaluate."""

from __future__ import annotations

import pytest

from llada_megatron.parallel import topology


@pytest.fixture(scope="module")
def world():
    with topology.world_of_one():
        yield
