"""What a cluster file may add to the job script: variables, lines of shell, options of sbatch and srun."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence

from llada_megatron.llada_moe.config.parsing import Refuse

OPTION = re.compile(r"--[a-z].+")

SCRIPT_VARIABLES = re.compile(
    "asked|avoid|before|changes|count|host|newest|nodes|port|reason|size|state|status|step|there|try|verdict"
)
"""Variables that the job script gives values of its own."""

_SHELL_VARIABLES = re.compile("BASHOPTS|BASH_ENV|EUID|GLOBIGNORE|IFS|POSIXLY_CORRECT|PPID|SHELLOPTS|UID")
"""Variables that change how the job script is read, or that a shell does not let anyone set."""

_JOB_VARIABLES = re.compile(
    r"LLADA_(JOB|ATTEMPT|RENDEZVOUS|PARENT|REPORTS|HEARTBEATS)"
    r"|SLURM_(JOB|STEP)_\w+|SLURM_(JOBID|JOB|STEPID|NODELIST|NODEID|PROCID|LOCALID|NTASKS|NPROCS|NNODES|RESTART_COUNT)"
    r"|SLURMD_NODENAME|TORCHELASTIC_\w+|MASTER_(ADDR|PORT)|((LOCAL|GROUP|ROLE)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE"
)
"""Variables by which SLURM, the job script and the launcher tell the processes of a job what they are."""

_ENTRY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)=(?P<value>.*)")

_PATH_KEPT = re.compile(r"(?<!\\)\$(PATH\b|\{PATH\})")

_RESERVED = ("nodes", "ntasks", "ntasks-per-node", "output", "error", "open-mode", "signal", "chdir", "export", "array")
"""Options of sbatch that the script sets itself and depends on."""

_KEYS = {"mem": "memory_per_node", "cpus-per-task": "cpus_per_node", "no-requeue": "requeue"}

_KEYS |= {name: name for name in ("partition", "account", "qos", "reservation", "constraint", "time", "exclusive")}

_KEYS |= {name: name.replace("-", "_") for name in ("exclude", "requeue", "gpus-per-node")}
"""Options of sbatch, and the key of the cluster file to use instead of each."""

_BASH_LIMIT_S = 20


def check_each(key: str, values: Iterable[str], pattern: re.Pattern[str], expected: str, refuse: Refuse) -> None:
    """Refuse each value of a list that is not the `expected`."""
    for number, value in enumerate(values):
        if not pattern.fullmatch(value):
            refuse(f"{key}.{number}", f"{value!r} is not {expected}")


def check_environment(entries: Sequence[str], refuse: Refuse) -> None:
    """Refuse what is not `NAME=value`, and variables that the job script or the launcher must set itself."""
    for number, entry in enumerate(entries):
        key, found = f"environment.{number}", _ENTRY.fullmatch(entry)
        if found is None:
            refuse(key, f"{entry!r} is not NAME=value")
        elif SCRIPT_VARIABLES.fullmatch(found["name"]) or _SHELL_VARIABLES.fullmatch(found["name"]):
            refuse(key, f"{found['name']} is a variable that the job script needs itself; choose another name")
        elif _JOB_VARIABLES.fullmatch(found["name"]):
            refuse(key, f"{found['name']} is set for every process by SLURM or the launcher; leave it out")
        elif found["name"] == "PATH" and not _PATH_KEPT.search(found["value"]):
            refuse(key, "without $PATH the job script would not find its programs; write PATH=/your/folder:$PATH")


def check_setup(lines: Sequence[str], refuse: Refuse) -> None:
    """Refuse lines that bash cannot read, such as one with an unbalanced quote: they would swallow the script."""
    fault = _bash_fault("\n".join(lines)) if lines else None
    if fault is None:
        return
    at = re.match(r"line (\d+): (?:warning: )?", fault)
    ends = itertools.accumulate(line.count("\n") + 1 for line in lines)
    number = next((i for i, end in enumerate(ends) if at and int(at[1]) <= end), None)
    said = fault[at.end() :] if at else fault
    refuse("setup" if number is None else f"setup.{number}", f"bash cannot read this: {said}")


def check_options(options: Sequence[str], refuse: Refuse) -> None:
    """Refuse options of sbatch that the script sets, and those that have a key of their own."""
    check_each("sbatch_options", options, OPTION, "an option such as --comment=llada (in its long form)", refuse)
    for number, option in enumerate(options):
        name = re.split(r"[=\s]", option.lstrip("-"), maxsplit=1)[0]
        key = f"sbatch_options.{number}"
        if name in _KEYS:
            refuse(key, f"--{name} has a key of its own; write {_KEYS[name]}: …")
        elif taken := [reserved for reserved in _RESERVED if name and reserved.startswith(name)]:
            short = "" if name in taken else f" (--{name} is short for it)"
            refuse(key, f"--{taken[0]} is set by the script, which depends on it{short}")


def _bash_fault(text: str) -> str | None:
    """What bash says of a text that it cannot read as a whole; None where it can, or where there is no bash."""
    bash = shutil.which("bash")
    if bash is None:
        return None
    done = subprocess.run(
        [bash, "--norc", "-n"],
        input=text + "\n",
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env={"LC_ALL": "C"},
        timeout=_BASH_LIMIT_S,
        check=False,
    )
    said = [line.removeprefix("bash: ").removeprefix(f"{bash}: ") for line in done.stderr.splitlines()]
    if done.returncode == 0 and not said:
        return None
    return said[0] if said else f"it ends with status {done.returncode}"
