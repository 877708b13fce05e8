"""One process as a whole world: what a benchmark of a single rank runs in."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator

from llada_megatron.llada_moe.config.layout import LayoutConfig


@contextlib.contextmanager
def single_process(seed: int = 0) -> Iterator[None]:
    """Prepares Megatron on this machine's device with one rank, and leaves again."""
    from llada_megatron.parallel import device

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    device.install()
    from llada_megatron.parallel import topology

    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and Megatron announce coming changes of their own insides
        topology.join(0, 1, init_method=f"file://{directory}/store")
        try:
            topology.initialize(LayoutConfig(), seed)
            yield
        finally:
            topology.leave()
