"""Where a conversion may put its output, and the lock that keeps a second process away from it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import TextIO

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, LladaError, ResourceError
from llada_megatron.llada_moe.overwriting import refuse_inside_checkpoint

_LOCK = "lock"

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN)

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)

_FULL = (errno.ENOSPC, errno.EDQUOT)

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def resolve(target: Path) -> Path:
    """The directory that `target` names, with links followed.

    Raises:
        ConfigError: it is a mount point, or lies in a checkpoint.
    """
    resolved = Path(os.path.realpath(target))
    refuse_inside_checkpoint("the target", resolved)
    if os.path.ismount(resolved):
        raise ConfigError(f"{resolved} is a mount point, which cannot be replaced: name a new directory in it")
    return resolved


def work_directory(target: Path) -> Path:
    """The directory in which the output for `target`, a resolved path, grows."""
    return target.with_name(f".{target.name}.converting")


def require_empty(target: Path) -> None:
    """Raises ConfigError: `target` is a file, or a directory that is not empty."""
    if target.is_dir():
        inside = sorted(path.name for path in target.iterdir())
        if inside:
            raise ConfigError(f"{target} is not empty (it holds {inside[0]!r}): name a new directory, or empty it")
    elif target.exists():
        raise ConfigError(f"{target} is a file; name a new directory")


class Lock:
    """The directory `root`, made if need be, for this process alone until `release` or the end of the process."""

    def __init__(self, root: Path) -> None:
        """Take the lock, without waiting for it.

        Raises:
            CheckpointError: the directory cannot be made.
            ResourceError: another process holds it, or the disk is full.
        """
        self._root = root
        try:
            self._stream = _acquire(root)
        except OSError as error:
            raise _failure(root, error) from error

    def release(self) -> None:
        """Release the lock, and remove the directory if it holds nothing else."""
        with contextlib.suppress(OSError):
            if os.listdir(self._root) == [_LOCK]:
                (self._root / _LOCK).unlink()
        self._stream.close()  # until then NFS keeps a name in the directory
        with contextlib.suppress(OSError):
            self._root.rmdir()


def _acquire(root: Path) -> TextIO:
    while True:
        root.mkdir(parents=True, exist_ok=True)
        try:
            stream = (root / _LOCK).open("w")
        except FileNotFoundError:
            continue  # a process that ended has just removed the directory
        try:
            _lock(stream, root)
            if os.path.samestat(os.fstat(stream.fileno()), os.stat(root / _LOCK)):
                return stream
        except FileNotFoundError:
            pass  # the same happened after the file was opened
        except BaseException:
            stream.close()
            raise
        stream.close()


def _lock(stream: TextIO, root: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            raise ResourceError(f"another process is converting to the same place ({root}): wait for it") from None
        if error.errno not in _WITHOUT_LOCKS:
            raise
        message(
            f"{root}: no locks on this file system ({error.strerror}); start no second conversion to the same place"
        )


def _failure(root: Path, error: OSError) -> LladaError:
    if error.errno in _FULL:
        return ResourceError(f"{root} cannot be made ({error.strerror}): make room, or write elsewhere")
    if error.errno == errno.ENAMETOOLONG:
        return CheckpointError(
            f"the name of the target is too long: the output grows in {root.name[:40]}… beside it; choose a shorter one"
        )
    if error.errno in _FORBIDDEN:
        return CheckpointError(
            f"{root} cannot be made ({error.strerror}): the output grows beside the target, so name one in a directory "
            "that you may write to"
        )
    return CheckpointError(f"{root} cannot be made ({error.strerror}): name a target in another directory")
