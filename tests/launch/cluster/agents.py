"""A job without SLURM: its directory, and one agent per node as processes of this machine with SLURM's variables."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from llada_megatron.launch.cluster.job import JobDirectory, Verdict
from llada_megatron.llada_moe.config import dump_yaml, load_run
from llada_megatron.parallel.training.heartbeat import FOLDER_VARIABLE, HeartbeatRecord, read_heartbeats
from tests.corpora import prepare_texts, write_texts

STEPS, INTERVAL = 20, 4
RUN = f"""
model: {{base: tiny-moe-softmax, vocab_size: 400}}
training: {{steps: {STEPS}, sequence_length: 32, global_batch_size: 8, precision: fp32, seed: 3}}
data: {{sets: [{{path: corpus}}], validation_fraction: 0.1}}
optimizer: {{learning_rate: {{peak: 3e-3, warmup_steps: 2}}}}
layout: {{data_parallel: 2}}
checkpoint: {{interval: {INTERVAL}, keep_last: 2}}
validation: {{interval: 0}}
logging: {{interval: 1, tensorboard: false}}
output_dir: OUTPUT
"""
CLUSTER = "ranks_per_node: 1\nrendezvous_timeout_s: 120\nlost_node_wait_s: 3\nmax_restarts: 20\n"
MODULE = "llada_megatron.launch.cluster."


def prepare(folder: Path) -> None:
    """A small corpus in `folder`."""
    prepare_texts(folder, write_texts(folder))


class Job:
    """One job on two nodes, `n0` and `n1`, of one rank each."""

    def __init__(self, folder: Path, output: str, *overrides: str, cluster: str = "") -> None:
        self.folder, self.output = folder, folder / output
        self.directory = JobDirectory(self.output / "jobs" / "job")
        self.directory.path.mkdir(parents=True)
        (folder / f"{output}.yaml").write_text(RUN.replace("OUTPUT", output))
        self.directory.run.write_text(dump_yaml(load_run(folder / f"{output}.yaml", overrides)))
        self.directory.cluster.write_text(CLUSTER + cluster)
        self.processes: list[subprocess.Popen] = []
        self.attempt = -1

    def start(self, program: str = "agent", nodes: tuple[int, ...] = (0, 1), **variables: str) -> None:
        """Start a program on the nodes, as a new attempt."""
        self.attempt += 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        for node in nodes:
            environment = os.environ | {
                "LLADA_ATTEMPT": str(self.attempt),
                "LLADA_RENDEZVOUS": f"127.0.0.1:{self.port}",
                "SLURM_JOB_ID": "17",
                "SLURM_NODEID": str(node),
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NODELIST": "n[0-1]",
                "SLURMD_NODENAME": f"n{node}",
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-P", "-m", MODULE + program, str(self.directory.path)]
            with self.directory.output.open("a") as out:
                process = subprocess.Popen(
                    command, cwd=self.folder, env=environment | variables, stdout=out, stderr=out
                )
            self.processes.append(process)

    def until(self, found: Callable[[], object], seconds: float = 400.0, pause: float = 0.02) -> None:
        """Wait until `found`; fail with the job's output when it is not in time, or the programs have ended."""
        deadline = time.monotonic() + seconds
        while not found():
            running = any(process.poll() is None for process in self.processes)
            assert time.monotonic() < deadline and (running or found()), self.said()
            time.sleep(pause)

    def ended(self, seconds: float = 600.0) -> Verdict | None:
        """Wait for the programs; the verdict of this attempt."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None
        return self.directory.read_verdict(self.attempt)

    def step(self) -> int:
        """The last step in the metrics."""
        rows = self.metrics()
        return rows[-1]["step"] if rows else 0

    def metrics(self) -> list[dict]:
        """The metrics' lines."""
        path = self.output / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )

    def losses(self) -> dict[int, float]:
        """Loss by step."""
        return {row["step"]: row["loss"] for row in self.metrics() if "loss" in row}

    def events(self, name: str) -> list[dict]:
        """The events of one kind."""
        return [event for event in self.directory.events() if event["event"] == name]

    def rank(self, node: int) -> psutil.Process:
        """The process of the rank on a node, once it is there."""
        agent = psutil.Process(self.processes[-2:][node].pid)
        self.until(lambda: self._ranks(agent))
        return self._ranks(agent)[0]

    def hang(self, node: int) -> None:
        """Stop the rank of a node for good, in a step, after its agent has seen how long steps take.

        Without that, and outside of steps, the far longer recovery.hang_other_s counts. Steps are shorter here than the
        agent's looks at them (0.2 s), so the rank first goes slowly.
        """
        rank = self.rank(node)
        folder = Path(rank.environ()[FOLDER_VARIABLE])
        beat = self._stop_in_step(rank, folder, node, 0)
        for _ in range(4):
            time.sleep(0.5)
            rank.resume()
            beat = self._stop_in_step(rank, folder, node, beat.step + 1)

    def _stop_in_step(self, process: psutil.Process, folder: Path, rank: int, step: int) -> HeartbeatRecord:
        """Stop a rank in a step, after at least `step` of them; returns its last sign of life."""

        def in_step() -> bool:
            beat = read_heartbeats(folder).get(rank)
            return beat is not None and beat.phase == "step" and beat.step >= step

        def stopped() -> bool:
            if in_step():
                process.suspend()
                while process.status() != psutil.STATUS_STOPPED:
                    time.sleep(0.001)
                if in_step():
                    return True
                process.resume()
            return False

        self.until(stopped, pause=0.002)
        return read_heartbeats(folder)[rank]

    @staticmethod
    def _ranks(agent: psutil.Process) -> list[psutil.Process]:
        return [child for child in agent.children() if MODULE + "agent.job_rank" in " ".join(child.cmdline())]

    def said(self) -> str:
        """The job's output, to show where a test fails."""
        return self.directory.output.read_text()

    def kill(self) -> None:
        """End everything that was started."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
