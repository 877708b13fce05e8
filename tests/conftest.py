"""What every test needs: one thread per process, and Megatron-Core ready for a machine without a GPU."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import hypothesis
import pytest
import torch

from llada_megatron.parallel import device
from tests import workers

torch.set_num_threads(1)
device.install()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control has what it starts ignore Ctrl-C

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("repeatable")


def _is_worker(config):
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """See `tests.workers`; in one process, tests run in the order in which they are collected.

    First of all, since pytest-xdist's own hook reads the groups.
    """
    if _is_worker(config):
        items.sort(key=workers.rank_of)
        for item in items:
            item.add_marker(pytest.mark.xdist_group(workers.group_of(item)))


def pytest_collection_finish():
    """What is imported and collected stays: collections of garbage need not look through it again and again."""
    gc.freeze()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Around the time limit of a test, which begins once the machine is free for it."""
    if not _is_worker(item.config):
        return (yield)
    with workers.machine(alone=item.get_closest_marker(workers.ALONE) is not None):
        return (yield)
