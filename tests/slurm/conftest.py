"""A real SLURM of two nodes, a small run to submit to it, and the same run left alone."""

import os
from pathlib import Path

import pytest

from benchmarks import private_slurm
from benchmarks.private_slurm import PrivateSlurm
from benchmarks.small_run import Workplace


def pytest_collection_modifyitems(items):
    """A fault takes a start of all ranks to recover from, on two cores that do everything."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def slurm():
    """Skips where SLURM is not installed; an installed one that does not start is a failure."""
    if missing := private_slurm.missing_programs():
        if os.environ.get("LLADA_REQUIRE_SLURM") == "1":
            pytest.fail(f"LLADA_REQUIRE_SLURM=1, and {private_slurm.how_to_install(missing)}")
        pytest.skip(private_slurm.how_to_install(missing))
    with PrivateSlurm() as started:
        yield started
        assert started.stop() == [], "processes of jobs were left"


@pytest.fixture(scope="session")
def place(slurm, tmp_path_factory) -> Workplace:
    """Where jobs are submitted from; all share one prepared corpus."""
    return Workplace(tmp_path_factory.mktemp("jobs"), slurm)


@pytest.fixture(scope="session")
def calm(place) -> Path:
    """The run that nothing happened to, started with `llada train`: two ranks."""
    return place.train("output_dir=calm")
