"""Where a conversion may put its output, for which layout, and the lock that keeps a second process away from it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from typing import TextIO

from llada_megatron.console import message
from llada_megatron.llada_moe.config.layout import LayoutConfig, check_layout, data_parallel_for_experts
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, LladaError, ResourceError

AXES = ("tensor_parallel", "pipeline_parallel", "pipeline_chunks_per_rank", "expert_parallel", "expert_tensor_parallel")
"""The axes that cut weights; the others hold copies."""


def parse_layout(text: str | None) -> LayoutConfig:
    """`tensor_parallel=2,expert_parallel=4` as a layout with as many data-parallel ranks as the experts need.

    Raises:
        ConfigError: an axis that cuts no weights or is given twice, or a value that is no number from 1.
    """
    axes: dict[str, int] = {}
    for word in text.split(",") if text else ():
        name, _, value = word.strip().partition("=")
        if name not in AXES or not value.isdecimal() or int(value) < 1:
            raise ConfigError(f"--layout {word}: it takes {', '.join(f'{axis}=N' for axis in AXES)}, with commas")
        if name in axes:
            raise ConfigError(f"--layout {text}: {name} twice")
        axes[name] = int(value)
    tensor = axes.get("tensor_parallel", 1)
    data = data_parallel_for_experts(tensor, axes.get("expert_parallel", 1), axes.get("expert_tensor_parallel", 1))
    return LayoutConfig(**axes, data_parallel=data, sequence_parallel=tensor > 1)


def require_layout(run: RunConfig) -> None:
    """Raises: ConfigError: the run's model cannot be cut as its layout says; with every reason."""
    reasons: list[str] = []
    check_layout(run.model, run.layout, lambda key, reason: reasons.append(f"{key.removeprefix('layout.')}: {reason}"))
    if reasons:
        raise ConfigError(f"--layout: {'; '.join(reasons)}")


_LOCK = "lock"

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN)

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)

_FULL = (errno.ENOSPC, errno.EDQUOT)

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def resolve(target: Path) -> Path:
    """The directory that `target` names, through links. Raises: ConfigError: it is a mount point."""
    resolved = Path(os.path.realpath(target))
    if os.path.ismount(resolved):
        raise ConfigError(f"{resolved} is a mount point, which cannot be replaced: name a new directory in it")
    return resolved


def work_directory(target: Path) -> Path:
    """Where the output for `target`, a resolved path, grows."""
    return target.with_name(f".{target.name}.converting")


def require_empty(target: Path) -> None:
    """Raises: ConfigError: there is a file at `target`, or something in it."""
    if target.is_dir():
        inside = sorted(entry.name for entry in target.iterdir())
        if inside:
            raise ConfigError(f"{target} is not empty (it holds {inside[0]!r}): name a new directory, or empty it")
    elif target.exists():
        raise ConfigError(f"{target} is a file; name a new directory")


class Lock:
    """The directory `root`, made if need be, for this process alone until `release` or its end."""

    def __init__(self, root: Path) -> None:
        """Does not wait.

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
        """Let others in, and leave no directory that holds nothing but the lock."""
        with contextlib.suppress(OSError):
            if os.listdir(self._root) == [_LOCK]:
                (self._root / _LOCK).unlink()
        self._stream.close()  # NFS keeps a name in the directory until then
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
            pass  # as above, after it was opened
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
