"""A run that is killed goes on as if nothing had happened: bit for bit under the same layout, to 1e-5 under another."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.corpora import prepare_texts
from tests.ranks import run_ranks
from tests.seeds import drawn

STEPS, INTERVAL = 12, 3
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
RUN = f"""
model: {{base: tiny-moe-softmax, vocab_size: 400}}
training: {{steps: {STEPS}, sequence_length: 32, global_batch_size: 8, precision: fp32, seed: 3}}
objective: {{time_sampling: stratified}}
data:
  sets: [{{path: corpus}}]
  validation_fraction: 0.1
optimizer: {{learning_rate: {{peak: 3e-3, warmup_steps: 2, decay_steps: 4}}}}
layout: {{data_parallel: 2, expert_parallel: 2}}
checkpoint: {{interval: {INTERVAL}, keep_last: 9}}
validation: {{interval: 6, sequences: 5}}
logging: {{interval: 1, tensorboard: false}}
output_dir: undisturbed
"""


def llada(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llada_megatron.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A folder with a corpus, run.yaml, and the finished run `undisturbed`."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "run.yaml").write_text(RUN)
    words = random.Random(0)
    for name in range(20):
        text = " ".join(
            words.choice(["masked", "tokens", "fill", "the", "gaps", "of", "a", "text"]) for _ in range(400)
        )
        (folder / f"{name}.txt").write_text(text + "".join(chr(33 + words.randrange(90)) for _ in range(300)))
    prepare_texts(folder, [f"{n}.txt" for n in range(20)])
    finished = llada("train", "run.yaml", "--json", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1])["steps"] == STEPS
    return folder


def lines(run: Path) -> list[dict[str, object]]:
    """What the metrics say of each step, without what depends on the clock and the memory."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "consumed_sequences", "validation/bits_per_byte")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in kept if key in row} for row in rows]


def tensors_of(checkpoint: str) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    return {k: v for k, v in dist_checkpointing.load_plain_tensors(checkpoint).items() if isinstance(v, torch.Tensor)}


def last_checkpoint(run: Path) -> dict[str, torch.Tensor]:
    return run_ranks(tensors_of, 1, str(run / "checkpoints" / f"step-{STEPS:08d}"))[0]


@pytest.fixture(scope="module")
def expected(undisturbed) -> dict[str, torch.Tensor]:
    """What the undisturbed run ended in."""
    return last_checkpoint(undisturbed / "undisturbed")


def kill_at_step(folder: Path, step: int, output: str) -> None:
    """Start a run and SIGKILL it, with all its ranks, once its metrics name `step`."""
    command = [sys.executable, "-m", "llada_megatron.cli", "train", "run.yaml", f"output_dir={output}"]
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    metrics, deadline = folder / output / "metrics.jsonl", time.monotonic() + 180
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and any(
            json.loads(x)["step"] >= step for x in metrics.read_text().splitlines() if x.endswith("}")
        ):
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


@pytest.mark.parametrize("attempt", [0, 1])
def test_killed_run_ends_in_the_same_bits(undisturbed, expected, attempt):
    step = drawn().randrange(1, STEPS - 1)
    print("killed at step", step)
    kill_at_step(undisturbed, step, f"killed{attempt}")
    resumed = llada("train", "run.yaml", f"output_dir=killed{attempt}", cwd=undisturbed)
    assert resumed.returncode == 0, resumed.stderr
    if step > INTERVAL:
        assert "continuing from" in resumed.stderr
    assert lines(undisturbed / f"killed{attempt}") == lines(undisturbed / "undisturbed")
    found = last_checkpoint(undisturbed / f"killed{attempt}")
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def flip_a_byte(checkpoint: Path) -> None:
    path = max(checkpoint.glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(checkpoint: Path) -> None:
    os.truncate(checkpoint / ".metadata", 100)


def lose_a_file(checkpoint: Path) -> None:
    min(checkpoint.glob("*.distcp")).unlink()


def lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


DAMAGE = {
    12: (flip_a_byte, "SHA-256 differs"),
    9: (cut_off, "has 100 bytes instead of"),
    6: (lose_a_file, "is missing"),
    3: (lose_the_manifest, "has no manifest.json"),
}
"""By the step of the checkpoint: what happens to it, and what is said of it."""


def test_damaged_checkpoints_are_passed_over_for_the_newest_whole_one_here_or_in_the_copies(undisturbed, expected):
    run, copies = undisturbed / "damaged", undisturbed / "elsewhere"
    shutil.copytree(undisturbed / "undisturbed", run)
    shutil.copytree(run / "checkpoints/step-00000003", copies / "step-00000003")
    for step, (damage, _) in DAMAGE.items():
        damage(run / f"checkpoints/step-{step:08d}")
    resumed = llada("train", "run.yaml", "output_dir=damaged", "checkpoint.copy_to=elsewhere", cwd=undisturbed)
    assert resumed.returncode == 0, resumed.stderr
    said = " ".join(resumed.stderr.split())
    for _, message in DAMAGE.values():
        assert message in said
    assert "elsewhere/step-00000003 at step 3" in said
    assert lines(run) == lines(undisturbed / "undisturbed")
    found = last_checkpoint(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    last = f"step-{STEPS:08d}/manifest.json"
    assert (copies / last).read_bytes() == (run / "checkpoints" / last).read_bytes()


def test_metrics_tell_what_each_save_took(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "undisturbed/metrics.jsonl").read_text().splitlines()]
    told = {row["step"]: row["checkpoint/seconds_lost"] for row in rows if "checkpoint/seconds_lost" in row}
    assert list(told) == [INTERVAL + 1, 2 * INTERVAL + 1, 3 * INTERVAL + 1]
    assert all(0 < seconds < 60 for seconds in told.values())


def test_another_layout_continues_the_same_loss_curve(undisturbed):
    moved = undisturbed / "moved"
    shutil.copytree(undisturbed / "undisturbed", moved)
    for step in (9, 12):
        shutil.rmtree(moved / f"checkpoints/step-{step:08d}")
    layout = ("layout.data_parallel=1", "layout.expert_parallel=1", "layout.pipeline_parallel=2")
    second = llada("train", "run.yaml", "output_dir=moved", *layout, cwd=undisturbed)
    assert second.returncode == 0, second.stderr
    assert "step-00000006 at step 6" in " ".join(second.stderr.split())
    pairs = zip(lines(undisturbed / "undisturbed"), lines(undisturbed / "moved"), strict=True)
    for expected, found in pairs:
        if found["step"] > 6 + 1:  # from here on the norms are those of weights that differ in their last bits
            del expected["grad_norm"], found["grad_norm"]
        assert found == pytest.approx(expected, rel=1e-5)


def test_changed_global_batch_size_is_refused(undisturbed):
    refused = llada("train", "run.yaml", "training.global_batch_size=4", "training.steps=20", cwd=undisturbed)
    assert refused.returncode == 2
    assert "training.global_batch_size was 8 and is 4" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_another_architecture_is_refused(undisturbed):
    refused = llada("train", "run.yaml", "model.num_layers=2", "training.steps=20", cwd=undisturbed)
    assert refused.returncode == 1
    assert "num_layers" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_finished_run_has_nothing_left_to_do(undisturbed):
    before = lines(undisturbed / "undisturbed")
    again = llada("train", "run.yaml", cwd=undisturbed)
    assert again.returncode == 0, again.stderr
    assert lines(undisturbed / "undisturbed") == before
