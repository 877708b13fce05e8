"""A run that is small enough to be disturbed many times: a made-up corpus, a tiny MoE, a cluster of a private SLURM.

A step takes some tenths of a second on one core, so that faults hit it anywhere; its checkpoints are megabytes.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.private_slurm import PARTITION, PrivateSlurm
from llada_megatron.llada_moe.errors import LladaError

INTERVAL = 5
"""Steps between checkpoints."""

RUN = f"""\
model: {{base: tiny-moe-softmax, vocab_size: 400, hidden_size: 128}}
training: {{steps: 40, sequence_length: 128, global_batch_size: 16, precision: fp32, seed: 3}}
objective: {{time_sampling: stratified}}
data:
  sets: [{{path: corpus}}]
optimizer: {{learning_rate: {{peak: 3e-4, warmup_steps: 5, decay_steps: 10}}}}
layout: {{data_parallel: 2, expert_parallel: 2}}
checkpoint: {{interval: {INTERVAL}, keep_last: 3}}
recovery: {{hang_minimum_s: 10, hang_other_s: 60}}
logging: {{interval: 1, tensorboard: false}}
output_dir: run
"""

CLUSTER = f"""\
ranks_per_node: 1
partition: {PARTITION}
time: "1:00:00"
lost_node: requeue
lost_node_wait_s: 5
rendezvous_timeout_s: 120
preflight:
  timeout_s: 120
  min_free_disk_gb: 0.1
"""


@dataclass(frozen=True)
class Submitted:
    """A job, as `llada submit` reported it."""

    id: int
    directory: Path
    """Records of the job."""
    output_dir: Path


class Workplace:
    """A folder with a corpus, run.yaml and cluster.yaml, and the `llada` program working in it on a SLURM."""

    def __init__(self, folder: Path, slurm: PrivateSlurm) -> None:
        self.folder, self.slurm = folder, slurm
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.yaml").write_text(RUN)
        self.cluster()
        if not (folder / "corpus").exists():
            self._make_corpus()

    def cluster(self, name: str = "cluster.yaml", python_path: Sequence[str] = (), **changes: object) -> str:
        """Write a cluster file with other values, return its name; `python_path` goes before the package's folder."""
        import yaml

        environment = [f"PYTHONPATH={_python_path(python_path)}", "OMP_NUM_THREADS=1"]
        values = yaml.safe_load(CLUSTER) | {"environment": environment}
        (self.folder / name).write_text(yaml.safe_dump(values | changes))
        return name

    def llada(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run `llada ARGUMENTS` in the folder; the caller looks at its exit code."""
        command = [sys.executable, "-P", "-m", "llada_megatron.cli", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self._environment(), capture_output=True, text=True, timeout=timeout
        )

    def must(self, *arguments: str, timeout: float = 300) -> dict[str, object]:
        """The JSON result of a command that has to succeed.

        Raises:
            LladaError: it failed; with its messages.
        """
        done = self.llada(*arguments, "--json", timeout=timeout)
        if done.returncode != 0:
            raise LladaError(f"llada {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def submit(self, *overrides: str, cluster: str = "cluster.yaml") -> Submitted:
        """Submit the run with `llada submit`, under overrides of its keys."""
        reported = self.must("submit", "run.yaml", "--cluster", cluster, *overrides)
        directory = self.folder / str(reported["directory"])
        return Submitted(int(str(reported["job_id"])), directory, directory.parent.parent)

    def train(self, *overrides: str) -> Path:
        """The same run undisturbed and without SLURM (`llada train`); returns its output directory."""
        reported = self.must("train", "run.yaml", *overrides, timeout=1200)
        return (self.folder / str(reported["metrics"])).parent

    def _environment(self) -> dict[str, str]:
        own = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONPATH": _python_path()}
        return self.slurm.environment | own | {"XDG_STATE_HOME": str(self.folder / "state")}

    def _make_corpus(self) -> None:
        draw = random.Random(0)
        words = ["masked", "tokens", "fill", "the", "gaps", "of", "a", "text"]
        texts = self.folder / "texts"
        texts.mkdir(exist_ok=True)
        for number in range(20):
            noise = "".join(chr(33 + draw.randrange(90)) for _ in range(300))
            (texts / f"{number:02}.txt").write_text(" ".join(draw.choice(words) for _ in range(400)) + noise)
        self.must("prepare", "texts", "--output", "corpus", "--train-tokenizer", "--vocab-size", "400")


def _python_path(before: Sequence[str] = ()) -> str:
    """The folder in which the interpreters of a job, which run with `-P`, find this package, installed or not."""
    import llada_megatron

    source = str(Path(llada_megatron.__file__).parents[1])
    return os.pathsep.join([*before, source])
