"""A run's folder and files of results as the commands write them, small and with known figures."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from llada_megatron.tools.bench.sampling.speed_and_quality import SpeedPoint, speed_record

RUN = {
    "model": {"family": "llada_moe", "num_layers": 2, "hidden_size": 64, "moe": {"num_experts": 4, "top_k": 2}},
    "objective": {"kind": "diffusion"},
    "training": {"steps": 1000, "sequence_length": 128, "precision": "fp32"},
    "layout": {"data_parallel": 2, "tensor_parallel": 1},
}


def run_folder(folder: Path, steps: int = 1000) -> Path:
    """A run whose loss is 8 - step / 200, not a number at step 7, with a broken line and a dead expert."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(RUN))
    lines = [json.dumps(_line(step)) for step in range(1, steps + 1)]
    lines.insert(3, '{"schema": 1, "step": ')
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5')  # the last line is being written
    tokens = {"1": [[30, 10, 0, 0]], "2": [[10, 10, 10, 10]]}
    (folder / "experts.jsonl").write_text(json.dumps({"step": steps, "steps": 10, "tokens": tokens}) + "\n")
    return folder


def _line(step: int) -> dict[str, float | int | None]:
    line = {"step": step, "loss": None if step == 7 else 8 - step / 200, "grad_norm": 1000.0 if step == 500 else 1.0}
    line |= {"learning_rate": 1e-3, "consumed_sequences": step * 8, "expert_load/max_over_mean": 3.0}
    if step % 100 == 0:
        line |= {"validation/bits_per_byte": 3 - step / 1000, "loss_by_mask_ratio/0.1-0.2": 1.5}
        line |= {"loss_by_mask_ratio/0.2-0.3": None, "expert_load/dead": 2}
    return line


def results(folder: Path, run: Path) -> list[Path]:
    """A file of each kind."""
    checkpoint = str(run / "checkpoints" / "step-00001000")
    bound = {"estimator": "bound", "samples": 128, "stratum": 8, "guidance": 0.0, "seed": 0}
    answers = {"nats": [-1.0, -2.0], "standard_error": [0.1, 0.1], "tokens": [2, 2], "bytes": [4, 4]}
    question = {**answers, "acc": True, "acc_norm": False, "margin": 1.0, "margin_error": 0.1, "right": 0}
    text = {"number": 9, "nats": [-8.0], "standard_error": [0.5], "tokens": [4], "bytes": [16]}
    harness = {
        "protocol": {
            "likelihood": bound,
            "sampling": {"preset": "llada"},
            "shots": {"piqa": 5},
            "checkpoint": checkpoint,
        },
        "results": {"piqa": {"alias": "piqa", "acc,none": 0.625, "acc_stderr,none": 0.0312, "bleu,none": float("nan")}},
        "n-samples": {"piqa": {"effective": 240}},
        "samples": {"piqa": [{"arguments": "x" * 1000}]},
    }
    spans = [
        {
            "writer": writer,
            "length": length,
            "spans": 64,
            "exact": {"value": 0.5 / length, "error": 0.03},
            "token_accuracy": {"value": 0.5, "error": 0.02},
            "bits_per_token": None if writer == "ranked" else {"value": 3.0 + length / 8, "error": 0.2},
            "parses": None,
            "length_right": None,
        }
        for writer in ("this model", "ranked")
        for length in (1, 8)
    ]
    samples = [
        {
            "number": n,
            "text": f"def f{n}(<b>):",
            "new": "(<b>):",
            "tokens": [1],
            "new_tokens": 4,
            "ended": n == 1,
            "forwards": 2,
        }
        for n in (1, 2)
    ]
    files = {
        "scores.jsonl": [{"protocol": {**bound, "checkpoint": checkpoint, "precision": "float32"}}]
        + [{"number": n, **question, "acc": n > 1} for n in range(1, 5)]
        + [text],
        "harness.json": harness,
        "infill.json": {"kind": "infill", "protocol": {**bound, "checkpoint": checkpoint}, "rows": spans},
        "samples.jsonl": samples,
        "experts.json": {
            "checkpoint": "other",
            "experts": 4,
            "top_k": 2,
            "layers": {"1": {"tokens": [4, 4, 4, 4]}},
        },
    }
    fast, slow = SpeedPoint(4.0, 0.5, 0.1, "schedule.threshold=0.5"), SpeedPoint(1.0, 0.9, 0.05, "as published", True)
    files["speeds.json"] = speed_record({"quick": [fast, slow], "poor": [SpeedPoint(2.0, 0.4, None)]}, {"prompts": 8})
    for name, content in files.items():
        lines = content if isinstance(content, list) else [content]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [folder / name for name in files]
