"""`llada train` on CPUs under many layouts: the memory of all its processes together, against what is predicted.

Two runs that are not compared say what processes take without their tensors: libraries, which they share, and each
one's own. glibc would keep what is freed below a threshold that it moves up to 32 MiB; here the threshold is fixed, so
that what the processes hold is what they use.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from llada_megatron.console import message
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.bench.planning.cpu_memory import cpu_tensors

EVERY_S = 0.02
SEQUENCE = 512
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "131072"}
TENSOR, SEQUENCES = "layout.tensor_parallel=2", "layout.sequence_parallel=true"
PIPELINE, DATA = "layout.pipeline_parallel=2", "layout.data_parallel=2"
CALIBRATION = {"one process": ("small-dense", 8), "two processes": ("small-dense", 8, DATA)}
"""Name, then model, sequences of a micro-batch, and keys of the layout."""
COMPARED = {
    "dense": ("small-dense", 32),
    "dense, all run again": ("small-dense", 48, "training.recompute=full"),
    "dense TP2": ("small-dense", 32, TENSOR),
    "dense TP2 SP": ("small-dense", 32, TENSOR, SEQUENCES),
    "dense PP2": ("small-dense", 24, PIPELINE),
    "dense PP2 in 4 chunks": ("small-dense", 24, PIPELINE, "layout.pipeline_chunks_per_rank=2"),
    "dense CP2": ("small-dense", 32, "layout.context_parallel=2"),
    "dense DP2": ("small-dense", 24, DATA),
    "dense TP2 SP PP2": ("small-dense", 24, TENSOR, SEQUENCES, PIPELINE),
    "MoE": ("small-moe", 24),
    "MoE TP2 SP": ("small-moe", 24, TENSOR, SEQUENCES),
    "MoE PP2": ("small-moe", 24, PIPELINE),
    "MoE DP2 EP2": ("small-moe", 24, DATA, "layout.expert_parallel=2"),
    "MoE DP2 ETP2": ("small-moe", 24, DATA, "layout.expert_tensor_parallel=2"),
}


@dataclass(frozen=True)
class TreePeak:
    """Bytes of a command's processes, pages that several share counted once."""

    together: float
    """The largest sum at one moment."""
    each: float
    """The sum of what each process had at most of its own, and the largest sum of what lies in files."""


@dataclass(frozen=True)
class CpuRow:
    """A run with bytes of all its processes together."""

    name: str
    tensors: float
    """Predicted, of all ranks."""
    predicted: float
    measured: TreePeak

    @property
    def error(self) -> float:
        """Predicted over the largest measured sum, less 1."""
        return self.predicted / self.measured.together - 1

    @property
    def error_of_each(self) -> float:
        """Predicted over the sum of what each process had at most, less 1: ranks that wait for each other only at the
        end of a step need not be at their fullest together where cores are few."""
        return self.predicted / self.measured.each - 1


@dataclass(frozen=True)
class ProcessBytes:
    """What processes take without the tensors of a step."""

    first: float
    """The launcher, one rank, and the libraries that all share."""
    further: float
    """Each rank more."""

    def of(self, ranks: int) -> float:
        """Of a run."""
        return self.first + self.further * (ranks - 1)


def cpu_rows(folder: Path) -> list[CpuRow]:
    """Run each layout in `folder`; raises ResourceError where one does not run."""
    data = prepared(folder)
    one, two = (_measured(name, *case, data=data, folder=folder) for name, case in CALIBRATION.items())
    alone = one[1].each - one[0]
    processes = ProcessBytes(alone, two[1].each - two[0] - alone)
    message(f"without tensors: {processes.first / 2**20:.0f} MiB, and {processes.further / 2**20:.0f} a further rank")
    rows = []
    for name, case in COMPARED.items():
        tensors, measured, ranks = _measured(name, *case, data=data, folder=folder)
        rows.append(CpuRow(name, tensors, tensors + processes.of(ranks), measured))
        message(f"{name}: predicted {rows[-1].predicted / 2**20:.0f}, measured {measured.together / 2**20:.0f} MiB")
    return rows


def case_run(model: str, sequences: int, *keys: str, data: str, output: str) -> tuple[RunConfig, list[str]]:
    """The run of a case, and the words of `llada train` that start it: two steps of two micro-batches a rank."""
    copies = 2 if DATA in keys else 1
    words = [
        "small-diffusion", f"model={model}", "training.steps=2", f"training.sequence_length={SEQUENCE}",
        f"training.micro_batch_size={sequences}", f"training.global_batch_size={2 * sequences * copies}",
        f"data.sets.0.path={data}", f"output_dir={output}", "validation.interval=0", "checkpoint.interval=1000",
        "logging.tensorboard=false", *keys,
    ]  # fmt: skip
    return load_run(words[0], words[1:]), words


def _measured(
    name: str, model: str, sequences: int, *keys: str, data: str, folder: Path
) -> tuple[float, TreePeak, int]:
    """Predicted bytes of all ranks' tensors, measured bytes of all processes, and the number of ranks."""
    output = folder / name.replace(" ", "-").replace(",", "")
    run, words = case_run(model, sequences, *keys, data=data, output=str(output))
    ranks = run.layout.world_size
    tensors = sum(cpu_tensors(run)) * ranks / run.layout.pipeline_parallel
    measured = tree_peak([sys.executable, "-P", "-m", "llada_megatron.cli", "train", *words], GLIBC)
    return tensors, measured, ranks


def tree_peak(command: list[str], variables: dict[str, str]) -> TreePeak:
    """What a command's processes hold, looked at every `EVERY_S`.

    Raises:
        ResourceError: it fails; with its last line.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL, stderr=errors)
        root, together, files = psutil.Process(process.pid), 0, 0
        own: dict[int, int] = {}
        while process.poll() is None:
            try:
                found = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                break
            now = {one.pid: proportional_bytes(one.pid) for one in found}
            together = max(together, sum(all_of_it for all_of_it, _ in now.values()))
            files = max(files, sum(all_of_it - anonymous for all_of_it, anonymous in now.values()))
            own |= {pid: max(anonymous, own.get(pid, 0)) for pid, (_, anonymous) in now.items()}
            time.sleep(EVERY_S)
        if process.wait():
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit {process.returncode}"]
            raise ResourceError(f"{' '.join(command[4:])}: {lines[-1]}")
    return TreePeak(float(together), float(files + sum(own.values())))


def proportional_bytes(process: int) -> tuple[int, int]:
    """Resident bytes of a process, a page that n processes share as a part of n, and those of them that are in no file;
    0 where it has ended. Linux only."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0, 0
    everything, anonymous = (int(text.partition(f"\n{key}:")[2].split()[0]) * 1024 for key in ("Pss", "Pss_Anon"))
    return everything, anonymous


def prepared(folder: Path) -> str:
    """A set of random words, long enough for two steps of each run."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(3000)]
    documents = [json.dumps({"text": " ".join(draw.choices(words, k=600))}) for _ in range(800)]
    (folder / "text.jsonl").write_text("\n".join(documents))
    command = [sys.executable, "-P", "-m", "llada_megatron.cli", "prepare", str(folder / "text.jsonl")]
    command += ["--output", str(folder / "corpus"), "--train-tokenizer", "--vocab-size", "1024"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(folder / "corpus")
