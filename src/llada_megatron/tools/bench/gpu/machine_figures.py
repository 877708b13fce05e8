"""The machine itself: what `llada env` says, and how fast it multiplies and copies at best."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch

from llada_megatron.console import message
from llada_megatron.parallel import device
from llada_megatron.parallel.training.peak import copy_peak, matmul_peak
from llada_megatron.tools import environment as report
from llada_megatron.tools.bench.gpu.part_run import PartRun

FP8_CAPABILITY = 89
_SECONDS = 1.0

NAMED_PEAKS = {
    "H100 PCIe": (756.0, 1513.0),
    "H100 NVL": (835.0, 1671.0),
    "H200 NVL": (835.0, 1671.0),
    "H100": (989.4, 1978.9),
    "H200": (989.4, 1978.9),
    "GH200": (989.4, 1978.9),
    "B200": (2250.0, 4500.0),
    "A100": (312.0, 0.0),
}
"""TFLOP/s of dense products in bf16 and in FP8 (NVIDIA's data sheets) by a part of the GPU's name; the first that fits
counts."""


def named_peak(name: str, fp8: bool) -> float | None:
    """FLOP/s that the data sheet names for the GPU; None where it is not in the table."""
    found = next((peaks for part, peaks in NAMED_PEAKS.items() if part in name), None)
    value = found[fp8] * 1e12 if found else 0.0
    return value or None


def environment(part: PartRun) -> None:
    """The whole report, in the results and for people, and what torch knows of the GPU beyond it."""

    def collected() -> dict[str, Any]:
        found = report.collect()
        for section, values in found.items():
            message(section.replace("_", " "))
            for name, value in values.items():
                message(f"  {name:<24} {value if not isinstance(value, dict) else value.get('detail', value)}")
        return {"report": json.dumps(found), **_gpu_facts()}

    part.measure("environment", collected)


def _gpu_facts() -> dict[str, Any]:
    if not device.cuda_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(0)
    facts: dict[str, Any] = {
        "free_gb": free / 1e9,
        "total_gb": total / 1e9,
        "multiprocessors": properties.multi_processor_count,
    }
    with contextlib.suppress(Exception):
        facts["driver_cuda"] = torch._C._cuda_getDriverVersion()
    for name in ("clock_rate", "power_draw", "temperature", "utilization"):
        with contextlib.suppress(Exception):  # they need NVIDIA's management library, and the right to ask it
            facts[name] = float(getattr(torch.cuda, name)())
    return facts


def ceilings(part: PartRun) -> None:
    """The largest products and copies, which the utilisation of a step is measured against."""
    here = device.current()
    seconds = 0.1 if part.toy else _SECONDS
    part.measure("bf16", lambda: {"flops_per_second": matmul_peak(here, torch.bfloat16, seconds)})
    if part.machine.capability >= FP8_CAPABILITY:
        part.measure("fp8", lambda: {"flops_per_second": matmul_peak(here, torch.float8_e4m3fn, _SECONDS)})
    part.measure("copy", lambda: {"bytes_per_second": copy_peak(here)})
