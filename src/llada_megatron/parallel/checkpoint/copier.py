"""The program that `copies.py` starts: it copies files of a checkpoint and reads them back, and does not import torch.

It is a process of its own so that neither training nor a fork of the trainer waits for it. It reads its order as JSON
from standard input, writes what went wrong, if anything, to standard output, and ends when its parent does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from llada_megatron.parallel.checkpoint.manifest import FileRecord, verify_digest
from llada_megatron.parallel.parent_death import die_with_parent

_NICENESS = 10


def copy_files(source: Path, target: Path, files: dict[str, FileRecord]) -> str | None:
    """Copy `files` from one directory into another and verify the copies. Returns what went wrong, or None."""
    for name, stated in files.items():
        try:
            shutil.copyfile(source / name, target / name)
            _make_durable(target / name)
        except OSError as error:
            return f"{error.strerror}: {error.filename or target / name}"
        fault = verify_digest(target, name, stated)
        if fault:
            return fault
    return None


def _make_durable(path: Path) -> None:
    """Wait until the storage holds the file, and drop it from memory so that it is read back from there."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def main() -> int:
    """Carry out the order on standard input: {"parent", "source", "target", "files": {name: [size, sha256]}}."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):  # the trainer decides when it ends
        signal.signal(number, signal.SIG_IGN)
    order = json.load(sys.stdin)
    die_with_parent(order["parent"])
    os.nice(_NICENESS)
    files = {name: FileRecord(*values) for name, values in order["files"].items()}
    fault = copy_files(Path(order["source"]), Path(order["target"]), files)
    print(fault or "", end="")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
