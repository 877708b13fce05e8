"""How many files a conversion may hold open at a time."""

from __future__ import annotations

import contextlib
import resource

from llada_megatron.console import message

_OTHERS = 64  # libraries, streams, the journal


def workers_for_files(workers: int, files_each: int, files: int) -> int:
    """How many of `workers` threads may run, with this process's limit raised as far as is needed and allowed.

    Args:
        files_each: most files that one thread writes at a time.
        files: those open for all of them.
    """
    fixed = files + _OTHERS
    wanted = fixed + workers * files_each
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < wanted:
        raised = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        with contextlib.suppress(OSError, ValueError):  # refused where the system has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, most))
            limit = raised
        if limit < wanted:
            fewer = max(1, (limit - fixed) // files_each)
            message(
                f"{fewer} workers instead of {workers}: each may write {files_each} files at a time, and this process "
                f"may open {limit} (raise the hard limit, `ulimit -Hn`, for more)"
            )
            return min(fewer, workers)
    return workers
