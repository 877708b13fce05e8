"""Measured ceilings are figures of this machine, and memory is what a process has used."""

from __future__ import annotations

import torch

from llada_megatron.parallel import peak


def test_ceilings_are_of_a_plausible_size(monkeypatch):
    monkeypatch.setattr(peak, "_SECONDS", 0.0)
    assert 1e9 < peak.matmul_peak("cpu", torch.float32) < 1e15
    assert 1e8 < peak.copy_peak("cpu") < 1e13


def test_peak_memory_grows_with_use_and_stays_below_the_machine():
    before = peak.peak_memory_gb()
    block = torch.ones(128, 2**20 // 4 + int(before * 1e9) // 512)
    assert block.numel() > 0
    assert before < peak.peak_memory_gb() < peak.total_memory_gb()
