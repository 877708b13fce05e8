"""`llada env`: complete, honest about what is not active, and without secrets."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec

import pytest
import torch

from llada_megatron import cli
from llada_megatron.llada_moe.model import grouped
from llada_megatron.llada_moe.model.attention import backends
from llada_megatron.tools import environment


def test_the_report(capsys):
    assert cli.main(["env", "--json"]) == 0
    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert list(report) == ["versions", "machine", "devices", "accelerations", "source", "environment"]
    assert report["versions"]["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert report["versions"]["megatron-core"] and report["machine"]["usable cores"] >= 1
    assert {"NCCL", "gloo", "transformer-engine", "apex", "flash-attn", "packed attention", "grouped experts"} <= set(
        report["accelerations"]
    )
    assert all(state["detail"] for state in report["accelerations"].values())
    assert report["accelerations"]["gloo"]["active"]
    assert "accelerations\n" in out


@pytest.mark.parametrize(
    ("cuda", "engine", "there", "active", "detail"),
    [
        (False, False, True, False, "on a CPU"),
        (True, True, True, True, "torch's grouped_mm in bfloat16, Transformer Engine's grouped product in FP8"),
        (True, True, False, True, "Transformer Engine's grouped product"),
        (True, False, True, True, "torch's grouped_mm in bfloat16"),
        (True, False, False, False, "no grouped_mm"),
    ],
)
def test_how_experts_are_computed(monkeypatch, cuda, engine, there, active, detail):
    monkeypatch.setattr(grouped, "GROUPED_MM", torch._grouped_mm if there else None)
    state = environment.grouped_experts_state(cuda, engine)
    assert state["active"] is active and detail in state["detail"]


def test_secrets_are_left_out():
    shown = environment.environment_variables(
        {
            "CUDA_VISIBLE_DEVICES": "0",
            "SLURM_JWT": "s3cret",
            "NCCL_API_KEY": "s3cret",
            "TORCH_PROXY": "http://me:s3cret@proxy:80",
            "AWS_SECRET_ACCESS_KEY": "s3cret",
            "HOME": "/home/me",
        }
    )
    assert "s3cret" not in str(shown)
    assert shown["CUDA_VISIBLE_DEVICES"] == "0" and shown["TORCH_PROXY"] == "http://<redacted>@proxy:80"
    assert shown["SLURM_JWT"] == "<redacted>" and not {"HOME", "AWS_SECRET_ACCESS_KEY"} & set(shown)


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("LLADA_DB_PWD", "s3cret", "<redacted>"),
        ("NCCL_PASSPHRASE", "s3cret", "<redacted>"),
        ("LLADA_URL", "https://s3cret@host/x", "https://<redacted>@host/x"),
        ("LLADA_URL", "https://me:s3cr:et@host/x@y", "https://<redacted>@host/x@y"),
        (
            "LLADA_URL",
            "https://host/x?a=b&X-Amz-Signature=s3cret&c=d",
            "https://host/x?a=b&<redacted>&c=d",
        ),
        ("LLADA_URL", "s3://bucket?access_key=s3cret", "s3://bucket?<redacted>"),
        ("LLADA_NOTE", "use hf_s3cretS3cret here", "use <redacted> here"),
        ("LLADA_NOTE", "ghp_s3cretS3cret", "<redacted>"),
        ("SLURM_CONF", "/etc/slurm/slurm.conf", "/etc/slurm/slurm.conf"),
        ("LD_LIBRARY_PATH", "/usr/lib:/opt/a@1/lib", "/usr/lib:/opt/a@1/lib"),
    ],
)
def test_secrets_inside_values_are_left_out(name, value, shown):
    assert environment.environment_variables({name: value}) == {name: shown}


def test_control_characters_of_variables_do_not_reach_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("LLADA_NOTE", "a\x1b]0;x\x07\nb")
    monkeypatch.setattr(
        environment, "collect", lambda: {"e": environment.environment_variables({"LLADA_NOTE": "\x1b[2J"})}
    )
    assert cli.main(["env"]) == 0
    assert capsys.readouterr().out == "e\n  LLADA_NOTE              ␛[2J\n"


def test_a_source_outside_git_has_no_commit(tmp_path):
    assert environment.source_state(tmp_path) == {"commit": None, "local changes": None}


def test_the_attention_of_a_run_is_told_with_its_reason(monkeypatch):
    backends.attention_backend.cache_clear()
    real = importlib.util.find_spec
    spec = ModuleSpec("triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: spec if name == "triton" else real(name, *rest))
    monkeypatch.setattr(backends, "_against_building", lambda: None)
    packed, blocks = (environment.attention_state(block, cuda=True, engine=True) for block in (None, 32))
    assert packed == {"active": True, "detail": "Transformer Engine, all documents in one call (serves this pattern)"}
    assert blocks["active"] and blocks["detail"].startswith("FlexAttention, all documents in one call (Transformer")
    backends.attention_backend.cache_clear()
    monkeypatch.setattr(backends, "_capability", lambda: (8, 0))
    older = environment.attention_state(None, cuda=True, engine=True)
    assert older["active"] and "documents needs compute capability 9.0; this GPU has 8.0" in older["detail"]
    assert not older["detail"].startswith("Transformer Engine")
    backends.attention_backend.cache_clear()
    without = environment.attention_state(None, cuda=False, engine=False)
    assert not without["active"] and "kernels for packed documents need CUDA" in without["detail"]
