"""Conversion needs neither `transformers` nor Megatron, nor a GPU."""

import os
import subprocess
import sys

from llada_megatron.llada_moe.config import load_model
from llada_megatron.tools.bench.convert import write_synthetic

PROGRAM = """
import sys
sys.modules["transformers"] = sys.modules["megatron"] = None  # importing either fails
from llada_megatron.cli import main
for words in (["import", "source", "sharded"], ["export", "sharded", "exported", "--without-tokenizer"],
              ["inspect", "exported"], ["verify", "source", "exported", "--no-logits"]):
    assert main(["convert", *words]) == 0, words
"""


def test_every_action_runs_without_transformers_megatron_or_a_gpu(tmp_path):
    write_synthetic(tmp_path / "source", load_model("tiny-moe"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "89 of 89 are equal bit for bit" in done.stdout
