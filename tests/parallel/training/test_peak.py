"""Measured ceilings are figures of this machine, and memory is what a process has used."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import psutil
import pytest
import torch

from llada_megatron.parallel.training import peak


def test_ceilings_are_of_a_plausible_size(monkeypatch):
    monkeypatch.setattr(peak, "_SECONDS", 0.0)
    assert 1e9 < peak.matmul_peak("cpu", torch.float32) < 1e15
    assert 1e8 < peak.copy_peak("cpu") < 1e13


def test_a_processor_without_instructions_for_the_type_is_not_waited_for(monkeypatch):
    sizes = []

    def slow_product(size, device, dtype):
        sizes.append(size)
        return lambda: time.sleep(0.1 * (size / 256) ** 3)

    monkeypatch.setattr(peak, "_product", slow_product)
    assert 0 < peak.matmul_peak("cpu", torch.bfloat16) <= 2 * 256**3 / 0.1
    assert sizes == [256]


@pytest.mark.parametrize(("room", "expected"), [(10, 0.5), (3, 0.5), (0, math.nan)])
def test_the_devices_time_of_a_call_is_taken_while_the_host_is_ahead(monkeypatch, room, expected):
    """A queue with `room` for that many calls: with more of them the host waits until the device has begun the first.
    Each call takes the device half a second."""
    given = []

    class Event:
        def __init__(self, enable_timing):
            self.calls = None

        def record(self):
            self.calls = len(given)

        def query(self):
            return len(given) - self.calls > room

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 500.0 * (end.calls - self.calls)

    monkeypatch.setattr(peak.torch.cuda, "Event", Event)
    monkeypatch.setattr(peak, "_synchronize", lambda device: None)
    monkeypatch.setattr(peak, "_product", lambda size, device, dtype: time.time)
    found = peak.device_seconds(lambda: given.append(1), torch.device("cuda"), 10)
    assert found == pytest.approx(expected, nan_ok=True)


def test_peak_memory_grows_with_use_and_stays_below_the_machine():
    before = peak.peak_memory_gb()
    block = torch.ones(128, 2**20 // 4 + int(before * 1e9) // 512)
    assert block.numel() > 0
    assert before < peak.peak_memory_gb() < psutil.virtual_memory().total / 1e9


def test_peak_memory_is_this_process_own_and_not_that_of_the_one_that_started_it():
    block = torch.ones(2**29)  # 2 GB: more than a process with torch alone
    assert peak.peak_memory_gb() > 2
    words = "from llada_megatron.parallel.training.peak import peak_memory_gb; print(peak_memory_gb())"
    printed = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout
    assert block.numel() > 0
    assert 0.05 < float(printed) < 1.5
