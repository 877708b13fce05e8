"""Reading and writing of large files without needless copies, at the speed of the disk."""

from __future__ import annotations

import os

import torch

_STEP = 64 * 2**20


def read_into(descriptor: int, offset: int, values: torch.Tensor) -> int:
    """Fill a contiguous tensor from byte `offset` of a file; returns the bytes read, fewer if the file ends before.

    Raises:
        OSError: it cannot be read.
    """
    target = memoryview(values.reshape(-1).view(torch.uint8).numpy())
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


class Writeback:
    """Makes the system write a growing file to the disk while the program goes on filling it.

    By itself, Linux collects gigabytes of a file in memory before it starts to write, and the disk is idle until then:
    the time to fill and the time to sync add up. Advice that the pages are not needed starts the writing at once, and
    does not wait for it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = self._asked = 0

    def wrote(self, count: int) -> None:
        """Note that `count` more bytes were written to the file."""
        self._size += count
        if self._size - self._asked >= _STEP and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            self._asked = self._size
