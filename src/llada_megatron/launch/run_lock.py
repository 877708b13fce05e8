"""The run lock: `OUTPUT_DIR/in-use.json` names the process that trains there, so that no other one does.

The process renews the file's time while it runs. The file appears complete (by a hard link, where the storage has them)
or not at all. Its time is compared with that of another file in the same directory, so the clocks of two machines need
not agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from llada_megatron.launch import files
from llada_megatron.llada_moe.errors import ResourceError

FILE_NAME = "in-use.json"

RENEWAL_S = 10.0
"""Seconds between two renewals."""

STALE_S = 60.0
"""After so many seconds without a renewal, a holder on another machine counts as gone."""

HANDOVER_S = 30.0
"""How many seconds a restart waits for an earlier process of its own job to end."""

_CLOCK_STEP_S = 5.0
"""Two processes whose times of start differ by more seconds than this are different ones."""

_POLL_S = 0.2


@dataclass(frozen=True)
class Holder:
    """The process that trains in a directory."""

    host: str
    machine: str
    """Boot and process namespace; process numbers can be compared only where this is equal."""
    pid: int
    started: float
    """When the process began, as `_started` measures it: the system reuses process numbers."""
    job_id: str | None
    since: float
    """When it took the directory, in seconds since 1970."""
    token: str
    """A random text that tells this holder from every other one."""

    @classmethod
    def this_process(cls, job_id: str | None) -> Holder:
        """This process as a holder."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _started(pid), job_id, time.time(), uuid.uuid4().hex)

    def is_here(self) -> bool:
        """Whether this process can see that one: it runs on the same machine, in the same process namespace."""
        return (self.host, self.machine) == (socket.gethostname(), _machine())

    def lives(self) -> bool:
        """Whether the process still exists; only for one that `is_here`."""
        try:
            same = abs(_started(self.pid) - self.started) < _CLOCK_STEP_S
            return same and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        job = f"job {self.job_id}, " if self.job_id else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{job}process {self.pid} on host {self.host} since {since}"


def check_free(output_dir: str | Path, job_id: str | None = None) -> None:
    """Refuse a directory that another run is training in.

    Args:
        job_id: the SLURM job that asks; a run lock of the same job does not count.

    Raises:
        ResourceError: another run trains there; with its process, and since when.
    """
    path = Path(output_dir) / FILE_NAME
    holder, renewed = _read(path)
    if holder is not None and not _gone(path, holder, renewed) and not _same_job(holder, job_id):
        raise _in_use(path, holder)


class RunLock:
    """The lock of a directory that this process trains in; `take` makes one."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path, self._holder = path, holder
        self._over = threading.Event()
        self._taken_by: Holder | None = None
        self._thread = threading.Thread(target=self._renew, name="run-lock", daemon=True)
        self._thread.start()

    @classmethod
    @contextlib.contextmanager
    def take(cls, output_dir: str | Path, job_id: str | None = None) -> Iterator[RunLock]:
        """Lock `output_dir` against every other process while the context is open; creates the directory if necessary.

        A lock is taken over where its process is dead, is on another machine and has not renewed it for `STALE_S`, or
        belongs to an earlier attempt of the same SLURM job. An earlier process of this job that still runs on this
        machine has `HANDOVER_S` to end.

        Raises:
            ResourceError: another run trains there.
            OSError: the directory cannot be written to.
        """
        path = Path(output_dir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = Holder.this_process(job_id)
        _acquire(path, mine)
        lock = cls(path, mine)
        try:
            yield lock
        finally:
            lock._release()

    def check(self) -> None:
        """Raise ResourceError when another process has taken the directory over, because this one seemed dead to it."""
        if self._taken_by is not None:
            raise ResourceError(
                f"{self._path.parent} was taken over by {self._taken_by}, to which this process seemed dead; "
                "this process ends without a checkpoint, so that two runs do not write to one directory"
            )

    def _renew(self) -> None:
        reported = False
        while not self._over.wait(RENEWAL_S):
            try:
                holder, _ = _read(self._path)
                if holder is None:  # somebody removed it
                    _put(self._path, self._holder)
                elif holder.token == self._holder.token:
                    os.utime(self._path)
                else:
                    self._taken_by = holder
                    return
                reported = False
            except OSError as error:  # a file server that is away for a while; the next renewal may succeed
                if not reported:
                    with contextlib.suppress(OSError):  # of the terminal, which may be a file on the same server
                        print(f"{self._path} could not be renewed ({error.strerror})", file=sys.stderr, flush=True)
                reported = True

    def _release(self) -> None:
        self._over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            holder, _ = _read(self._path)
            if holder is not None and holder.token == self._holder.token:
                self._path.unlink()


def _acquire(path: Path, mine: Holder) -> None:
    deadline = time.monotonic() + HANDOVER_S
    while not _put(path, mine):
        holder, renewed = _read(path)
        if holder is None:
            continue
        if _gone(path, holder, renewed) or (_same_job(holder, mine.job_id) and not holder.is_here()):
            _remove_stale(path, holder)
        elif _same_job(holder, mine.job_id) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        else:
            raise _in_use(path, holder)


def _put(path: Path, holder: Holder) -> bool:
    """Create the file with its whole content; returns False where there is one."""
    return files.make_once(path, json.dumps(asdict(holder)))


def _remove_stale(path: Path, stale: Holder) -> None:
    """Remove the lock of `stale`, but never that of another process which has just taken it over as well."""
    aside = files.aside(path)
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    found, _ = _read(aside)
    if found is not None and found.token != stale.token:
        with contextlib.suppress(FileExistsError):
            files.link(aside, path)
    aside.unlink()


def _read(path: Path) -> tuple[Holder | None, float]:
    """The holder of the directory (None: nobody), and the time of its last renewal by the clock of the file system."""
    try:
        # only when a file is opened does NFS ask the server for its time
        with path.open(encoding="utf-8", errors="replace") as stream:
            renewed, text = os.fstat(stream.fileno()).st_mtime, stream.read()
    except FileNotFoundError:
        return None, 0.0
    try:
        return Holder(**json.loads(text)), renewed
    except (ValueError, TypeError):
        return Holder("unknown", "", 0, 0.0, None, renewed, f"unreadable {renewed}"), renewed


def _time_there(path: Path) -> float:
    """The time by the clock of the file system; by this machine's where the directory cannot be written to."""
    temporary = files.aside(path)
    try:
        temporary.touch()
        now = temporary.stat().st_mtime
        temporary.unlink()
        return now
    except OSError:
        return time.time()


def _gone(path: Path, holder: Holder, renewed: float) -> bool:
    return not holder.lives() if holder.is_here() else _time_there(path) - renewed > STALE_S


def _same_job(holder: Holder, job_id: str | None) -> bool:
    return job_id is not None and holder.job_id == job_id


def _in_use(path: Path, holder: Holder) -> ResourceError:
    wait = "" if holder.is_here() else f" (if that machine is gone, try again in {STALE_S:.0f} seconds)"
    return ResourceError(
        f"{path.parent} is being trained by {holder}; stop that run, or set another output_dir: two runs must not "
        f"write to one directory{wait}"
    )


def _started(pid: int) -> float:
    """When a process began: on Linux in seconds since the boot, so that setting the clock changes nothing.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    created = psutil.Process(pid).create_time()
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text("utf-8", errors="replace").rpartition(")")[2]
        return int(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5)
    except OSError:
        return created


def _machine() -> str:
    """On Linux, the boot and the namespace of process numbers; elsewhere nothing, and only host names are compared."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
