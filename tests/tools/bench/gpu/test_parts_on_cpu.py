"""Every part runs here, at the size of a test, in one process; a second start has nothing left to do."""

from __future__ import annotations

import time

import pytest

from llada_megatron.tools.bench.gpu.goals import claims
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.parts import BY_NAME, PARTS
from llada_megatron.tools.bench.gpu.results_file import Measurement, ResultsFile
from llada_megatron.tools.bench.gpu.worker_process import run_group

HERE = Machine("a CPU", 0, 0, "for tests")
IN_ORDER = sorted(PARTS, key=lambda part: part.name != "reference")  # it runs beside others, in a process of its own


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    made = ResultsFile(tmp_path_factory.mktemp("gpu") / "bench.jsonl")
    made.open_for(HERE)
    assert run_group(IN_ORDER, made, HERE, time.monotonic() + 600) == 0
    return made


def test_every_part_is_done_and_has_figures(results):
    known = results.read()
    errors = {f"{each.part}: {each.name}": each.error for each in known.measurements.values() if each.error}
    assert errors == {}
    assert known.ends == {part.name: ("done", "") for part in PARTS}
    assert {part for part, _ in known.measurements} == {part.name for part in PARTS}


def test_the_same_machine_agrees_with_itself(results):
    known = results.read()
    for part in ("exact", "exact-local"):
        exact = [each.figures["worst"] for each in known.of(part) if each.name.endswith("fp32")]
        assert len(exact) == 2 and max(exact) < 1e-6
        assert len(known.expected[part]) == len(known.of(part)) == 5
        assert known.figure(part, "demo's model", "worst") < 1e-6
    assert known.figure("exact", "llada2, packed, block-causal, bf16", "all_gradients") > 1e-4


def test_figures_are_those_of_what_was_run(results):
    known = results.read()
    one, many = (
        known.figure("dense", f"bf16, {n} a window", "flops_per_token") for n in ("1 document", "40 documents")
    )
    assert many < one  # shorter documents have fewer pairs to attend to
    profile = next(iter(known.of("profile"))).figures
    assert sum(share for name, share in profile.items() if name.startswith("share of")) == pytest.approx(1.0)
    longest = results.beside("kernels.txt").read_text().splitlines()
    assert len(longest) == 15 and all(" % " in line and " ms " in line for line in longest)
    assert 0 < known.figure("checkpoint", "save and load", "gb") < 0.1
    for cell in known.of("attention"):
        assert cell.figures["difference"] < 1e-5 and cell.figures["gradient_difference"] < 1e-5
    assert len(known.of("attention")) == 5
    assert known.figure("sampler", "batch 1, with graphs", "same_tokens") == 1.0


def test_nothing_is_judged_without_a_gpu(results):
    found = claims(results, HERE, PARTS)
    assert len(found) > 30 and all(claim.holds is None and claim.goal == "reported" for claim in found)


def test_a_restart_measures_only_what_is_missing(results):
    before = results.path.read_text()
    known = results.read()
    results.add(Measurement("loss", "vocabulary 157,184, chunks of 256 MiB", {}, 0.0, "it failed"))
    done = ("exact", "dense", "fp8-loss", "sampler", "checkpoint", "profile", "ceilings", "loss")
    assert run_group([BY_NAME[name] for name in done], results, HERE, time.monotonic() + 600) == 0
    added = results.path.read_text().removeprefix(before)
    assert added.count('"measurement"') == 2 and "it failed" in added  # the failure, and what mended it
    again = results.read().measurements
    assert again.keys() == known.measurements.keys() and again["loss", "vocabulary 157,184, chunks of 256 MiB"].figures
