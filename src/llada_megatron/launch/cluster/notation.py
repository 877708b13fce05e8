"""What cluster files and SLURM's options write as text: times, lists of hosts, memory, devices (sbatch(1))."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_TIME = re.compile(
    r"((?P<days>\d{1,9})-(?P<day_hours>\d{1,9})(:(?P<day_minutes>\d{1,9})(:(?P<day_seconds>\d{1,9}))?)?"
    r"|((?P<hours>\d{1,9}):(?=\d{1,9}:))?(?P<minutes>\d{1,9})(:(?P<seconds>\d{1,9}))?)",
    re.ASCII,
)

_UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}

_NO_LIMIT = ("infinite", "unlimited", "-1", "0")

_RANGES = r"\[\d+(-\d+)?(,\d+(-\d+)?)*\]"

_HOSTS = re.compile(rf"([^\s,;\[\]]|{_RANGES})+")

_COMMA = re.compile(r"\s*,\s*(?![^\[]*\])")
"""A comma outside of brackets."""

MEMORY = re.compile(r"\d+([KMGT]B?)?", re.IGNORECASE | re.ASCII)

_GPUS = re.compile(r"(?P<resource>gpu:)?((?P<type>[A-Za-z][\w.-]*):)?(?P<count>\d{1,9})", re.ASCII)


def seconds(time: str) -> float | None:
    """A time limit as SLURM writes it, in seconds; infinity for no limit, None for a text that is not one.

    Its forms (sbatch(1), --time): M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, and for no limit 0, -1, INFINITE or UNLIMITED.
    """
    if time.lower() in _NO_LIMIT:
        return math.inf
    found = _TIME.fullmatch(time)
    if found is None:
        return None
    parts = {name.removeprefix("day_"): int(value) for name, value in found.groupdict().items() if value is not None}
    return sum(_UNITS[name] * value for name, value in parts.items())


def host_list(text: str) -> list[str] | None:
    """The parts of a list of hosts, each a name or compressed as SLURM does it (`node[1-4,7]`); None if it is none."""
    parts = _COMMA.split(text.strip())
    return parts if all(map(_HOSTS.fullmatch, parts)) else None


@dataclass(frozen=True)
class GpuRequest:
    """The GPUs of a node, and the option of sbatch that asks for them."""

    count: int
    option: str
    """Its name without dashes; `gres` where the value names the resource, as some sites want it."""
    value: str


def gpu_request(value: int | str) -> GpuRequest | None:
    """What `4`, `a100:4` (--gpus-per-node) or `gpu:a100:4` (--gres) asks for; None for a text that is none of them."""
    found = _GPUS.fullmatch(str(value))
    if found is None:
        return None
    return GpuRequest(int(found["count"]), "gres" if found["resource"] else "gpus-per-node", str(value))
