"""The benchmark of conversion, on a checkpoint of a few hundred kilobytes."""

import argparse

import pytest

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.bench import convert


def test_both_directions_are_measured_beside_copies_and_end_in_the_same_tensors(tmp_path):
    claims = convert._measure(tmp_path, load_model("tiny-moe"), 0.0005, "expert_parallel=2")
    values = {claim.claim: claim for claim in claims}
    assert values["tensors that differ after both directions"].value == 0
    assert values["size of the checkpoint"].holds is False
    for action in ("import", "export"):
        assert 0.05 < values[f"{action}: peak memory of the process"].value < 2
        assert values[f"{action}: time / time of a plain copy (mean of two)"].value > 0
        assert values[f"plain copy after the {action}: throughput"].value > 0
    assert not (tmp_path / "copy").exists()


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: argparse.Namespace(free=10**9))
    args = argparse.Namespace(layers=6, directory=str(tmp_path), layout=None)
    with pytest.raises(ResourceError, match="1 GB free of 39: name another place with --directory, or fewer --layers"):
        convert.run(args)
    assert list(tmp_path.iterdir()) == []
