"""The processes of `llada bench gpu`: one for each group of parts, a new one for what is left when one dies."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from llada_megatron.console import message
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.part_run import CUT, FAILED, parts_left
from llada_megatron.tools.bench.gpu.parts import EXACT, EXACT_LOCAL, ON_CPU, START_SECONDS, Part, stages
from llada_megatron.tools.bench.gpu.results_file import ResultsFile
from llada_megatron.tools.bench.gpu.worker_process import GRACE_SECONDS

_ENVIRONMENT = {
    ON_CPU: {"CUDA_VISIBLE_DEVICES": ""},
    EXACT: {"NVIDIA_TF32_OVERRIDE": "0"},  # Transformer Engine asks cuBLAS for TF32 whatever torch is told
    EXACT_LOCAL: {"NVIDIA_TF32_OVERRIDE": "0"},
}


def start_worker(
    parts: Sequence[Part], results: ResultsFile, machine: Machine, until: float
) -> subprocess.Popen[bytes]:
    """A process that runs `parts`, which are of one kind of process."""
    kind = parts[0].process
    options = {
        "output": results.path.absolute(),
        "process": kind,
        "machine": json.dumps(asdict(machine)),
        "parts": ",".join(part.name for part in parts),
        "until": until,
        "parent": os.getpid(),
    }
    command = [sys.executable, "-P", "-m", "llada_megatron.tools.bench.gpu.worker_process"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(command, env=os.environ | _ENVIRONMENT.get(kind, {}), stdin=subprocess.DEVNULL)


@dataclass
class Supervisor:
    """Runs parts in processes of their own until they are done or the time is over."""

    results: ResultsFile
    machine: Machine
    until: float
    """Of time.monotonic()."""
    start: Callable[..., Any] = start_worker
    _processes: list[Any] = field(default_factory=list)
    _stopped: bool = False

    def run(self, parts: Sequence[Part]) -> None:
        """Run what of `parts` is left to do, and then what was cut once more in the time that the others left over.

        However it ends, also by Ctrl-C, no process is left behind.
        """
        threads = ThreadPoolExecutor()
        try:
            self._run_stages(parts_left(self.results.read(), parts), threads)
            ends = self.results.read().ends
            cut = [part for part in parts if CUT in (ends.get(name, ("", ""))[0] for name in (part.name, part.needs))]
            if cut and self.until - time.monotonic() > START_SECONDS:
                message(f"time is left for what was cut: {', '.join(part.name for part in cut)}")
                self._run_stages(cut, threads)
        finally:
            self._stopped = True
            for process in self._processes:
                process.kill()
            threads.shutdown()

    def _run_stages(self, parts: Sequence[Part], threads: ThreadPoolExecutor) -> None:
        for together in stages(parts):
            for part in itertools.chain.from_iterable(together):
                self.results.plan(part.name)
            for group in [threads.submit(self._run_group, parts) for parts in together]:
                group.result()

    def _run_group(self, parts: Sequence[Part]) -> None:
        """Parts of one kind of process: one process, and another one for what is left after each that dies."""
        left = list(parts)
        while left and time.monotonic() < self.until and not self._stopped:
            process = self.start(left, self.results, self.machine, self.until)
            self._processes.append(process)
            code = self._wait(process, left)
            if code == 0 or self._stopped:
                return
            self._note_death(left, code)
            ended = self.results.read().ends
            left = [part for part in left if part.name not in ended]

    def _wait(self, process: Any, parts: Sequence[Part]) -> int:
        """The exit code; a process that outlives all its parts' times is ended."""
        limit = sum(part.seconds * 1.5 + GRACE_SECONDS for part in parts) + 60
        try:
            return int(process.wait(timeout=limit))
        except subprocess.TimeoutExpired:
            process.kill()
            return int(process.wait())

    def _note_death(self, parts: Sequence[Part], code: int) -> None:
        """Write down the end of the part that was under way when the process died; of all, where it began none."""
        known = self.results.read()
        none_began = not any(part.name in known.begun or part.name in known.ends for part in parts)
        for part in parts if none_began else [part for part in parts if part.name in known.begun]:
            seconds = 0.0 if none_began else time.time() - known.begun[part.name]
            status = CUT if seconds > part.seconds * 1.5 else FAILED
            said = "before it began a part" if none_began else f"{seconds:.0f} s into this part"
            detail = f"its process ended {said} ({_reason(code)}); see {self.results.beside('log')}"
            self.results.end(part.name, status, detail)
            message(f"{part.name}: {detail}")


def _reason(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
