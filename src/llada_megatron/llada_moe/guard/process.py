"""Calls of code that is not ours, in a process with limits that is started once and replaced when it has died."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from typing import Any

from llada_megatron.llada_moe import errors
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.guard.answering import LENGTH, write_message
from llada_megatron.llada_moe.guard.limits import Limits

LIMITS = Limits()
_BLOCK = 2**16
_SINGLE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def call(what: str, function: str, *arguments: Any, cpu_s: int | None = None) -> Any:
    """The result of `function` (`module:name`) of these JSON values, computed in the process with limits.

    Args:
        what: what the code came with, as an error names it: "the chat template", "tokenizer.json".
        cpu_s: processor time for this call; None = `LIMITS.cpu_s`, which it cannot exceed.

    Raises:
        DataError: the code takes too much time or memory, dies, or fails.
        LladaError: one that the function itself raised.
    """
    with _lock:
        return _running().call(what, function, arguments, min(cpu_s or LIMITS.cpu_s, LIMITS.cpu_s))


class LimitedProcess:
    """A process that answers calls within limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.owner = limits, os.getpid()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "llada_megatron.llada_moe.guard.answering", json.dumps(asdict(limits))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=_environment(),
            start_new_session=True,  # a signal to the group of this process is not for it
        )

    @property
    def usable(self) -> bool:
        """Whether it lives, belongs to this process and not to the one that this was forked from, and has the limits
        of now."""
        return self.owner == os.getpid() and self._process.poll() is None and self.limits == LIMITS

    def call(self, what: str, function: str, arguments: tuple[Any, ...], cpu_s: int) -> Any:
        """See `call` of this module."""
        try:
            body = json.dumps({"function": function, "arguments": arguments, "cpu_s": cpu_s}).encode("ascii")
            with contextlib.suppress(BrokenPipeError):  # it has died, as the missing answer will tell
                write_message(self._process.stdin, body)  # type: ignore[arg-type]
            answer = self._read()
        except BaseException:  # Ctrl-C: an answer that comes later must not be taken for the next one's
            self.close()
            raise
        if answer is None:
            raise DataError(f"{what} {self._end(cpu_s)}: refused")
        found = json.loads(answer)
        if "value" in found:
            return found["value"]
        if "error" in found:
            raise getattr(errors, found["error"], DataError)(found["message"])
        if "memory" in found:
            self.close()
            raise DataError(f"{what} {self._too_much_memory}: refused")
        raise DataError(f"{what} {found['problem']}")

    def close(self) -> None:
        """End the process; of one that another process owns, only give back the handles."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        self._said.close()

    def _read(self) -> bytes | None:
        """The answer; None where the process ends, or does not answer in time and is ended."""
        stdout = self._process.stdout
        assert stdout is not None
        poller, body = select.poll(), bytearray()
        poller.register(stdout, select.POLLIN)
        while len(body) < LENGTH.size or len(body) < LENGTH.size + LENGTH.unpack_from(body)[0]:
            if not poller.poll(self.limits.wall_s * 1000):
                self._process.kill()
                return None
            block = os.read(stdout.fileno(), _BLOCK)
            if not block:
                return None
            body += block
        return bytes(body[LENGTH.size :])

    @property
    def _too_much_memory(self) -> str:
        return f"takes more than {self.limits.memory_bytes / 2**30:g} GiB of memory"

    def _end(self, cpu_s: int) -> str:
        """How the process ended, in words; it is closed."""
        code = self._process.wait()
        self._said.seek(0)
        said = self._said.read(2**16).decode("utf-8", "replace")
        self.close()
        if code == -signal.SIGXCPU:
            return f"takes more than {cpu_s} seconds of processor time"
        if "memory allocation" in said or "bad_alloc" in said or "MemoryError" in said:
            return self._too_much_memory
        if code == -signal.SIGKILL:
            return f"was killed: it took too much memory, or gave no answer for {self.limits.wall_s:g} seconds"
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        line = next((line.strip() for line in said.splitlines() if line.strip()), "")
        return f"ends the process that runs it ({how}{': ' if line else ''}{line[:200]})"


def _environment() -> dict[str, str]:
    variables = {**os.environ, "RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}
    return variables | dict.fromkeys(_SINGLE_THREAD, "1")  # each thread would count with its stack


_lock = threading.RLock()
_current: LimitedProcess | None = None


def _running() -> LimitedProcess:
    """The process of this process, started now if there is none."""
    global _current
    if _current is None or not _current.usable:
        if _current is not None:
            _current.close()
        _current = LimitedProcess(LIMITS)
    return _current


def _close_at_exit() -> None:
    if _current is not None and _current.owner == os.getpid():
        _current.close()


def _unlock_after_fork() -> None:
    """Another thread may have held the lock at the moment of the fork; that thread is not here."""
    global _lock
    _lock = threading.RLock()


atexit.register(_close_at_exit)
os.register_at_fork(after_in_child=_unlock_after_fork)
