"""The metrics file: one line per step whatever happened to the run, and figures equal to those by hand."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.objectives.interface import bits_per_byte
from llada_megatron.parallel.training import json_lines, metrics_file, metrics_writer
from llada_megatron.parallel.training.metrics import MaskRatioLoss, Throughput
from llada_megatron.parallel.training.metrics_file import last_metrics, read_metrics
from llada_megatron.parallel.training.metrics_writer import SCHEMA, MetricsWriter


def write_steps(run_dir, steps, from_step=0, tensorboard=False):
    with MetricsWriter(run_dir, tensorboard=tensorboard, from_step=from_step) as writer:
        for step in steps:
            writer.write(
                step, {"loss": torch.tensor(1.0 / step), "consumed_sequences": 8 * step, "learning_rate": 1e-3}
            )


def test_a_line_is_one_json_object_with_schema_step_and_consumed_sequences(tmp_path):
    write_steps(tmp_path, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1] == {"schema": SCHEMA, "step": 2, "loss": 0.5, "consumed_sequences": 16, "learning_rate": 1e-3}


def test_values_without_consumed_sequences_are_refused(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer, pytest.raises(ValueError, match="consumed_sequences"):
        writer.write(1, {"loss": 1.0})


def test_nothing_is_converted_before_flush(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    loss = torch.tensor(3.0)
    writer.write(1, {"loss": loss, "consumed_sequences": 1})
    assert read_metrics(tmp_path) == []
    assert writer.flush() == [{"schema": SCHEMA, "step": 1, "loss": 3.0, "consumed_sequences": 1}]
    assert read_metrics(tmp_path)[0]["loss"] == 3.0
    writer.close()


def test_non_finite_values_are_null_and_the_line_stays_json(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": torch.tensor(math.nan), "gradient_norm": math.inf, "consumed_sequences": 1})
    (line,) = read_metrics(tmp_path)
    assert line["loss"] is None and line["gradient_norm"] is None


@settings(derandomize=True, deadline=None, max_examples=25)
@given(killed_after=st.integers(1, 20), checkpoint=st.integers(0, 20), cut=st.integers(0, 30))
def test_a_resumed_run_has_every_step_exactly_once(tmp_path_factory, killed_after, checkpoint, cut):
    run_dir = tmp_path_factory.mktemp("run")
    checkpoint = min(checkpoint, killed_after)
    write_steps(run_dir, range(1, killed_after + 1))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"schema": SCHEMA, "step": killed_after + 1, "consumed_sequences": 0})[:cut])
    write_steps(run_dir, range(checkpoint + 1, 23), from_step=checkpoint + 1)
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(1, 23))


def test_a_file_that_needs_no_change_is_not_touched(tmp_path):
    write_steps(tmp_path, [1, 2])
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    write_steps(tmp_path, [], from_step=3)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_resumed_run_reads_one_line_only_of_those_that_it_keeps_and_drops(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    middle = b'{"schema":1,"step":%d,' + b"[" * 100_000 + b"\n"  # not JSON, and not read
    last = b'{"schema": 1, "step": 20, "loss": 1.0}\n'
    kept = b"".join(middle % step for step in range(1, 20)) + last
    file.write_bytes(kept + b"".join(middle % step for step in range(21, 30)) + b'{"schema":1,"step":30')
    parsed = []
    monkeypatch.setattr(json_lines, "parse_line", lambda text: parsed.append(text) or metrics_file.parse_line(text))
    write_steps(tmp_path, [21], from_step=21)
    assert parsed == [last]
    text = file.read_bytes()
    assert text[: len(kept)] == kept and text[len(kept) :].startswith(b'{"schema":1,"step":21,"loss":0.04')
    file.write_bytes(b'{"step":3}\n' + last.replace(b"}", b""))  # of an earlier step, and not a line
    write_steps(tmp_path, [], from_step=21)
    assert file.read_bytes() == b'{"step":3}\n'


def test_a_line_half_written_is_left_out_by_the_reader(tmp_path):
    write_steps(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"schema": 1, "st')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_the_newest_line_with_a_key_is_found_from_the_end_of_a_long_file(tmp_path):
    assert last_metrics(tmp_path, "loss") == {}
    lines = [
        {"step": step, "loss": 1.0, "filler": "x" * 100} | ({"speed": step} if step % 10 == 0 else {})
        for step in range(1, 2001)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    assert last_metrics(tmp_path, "loss")["step"] == 2000
    assert last_metrics(tmp_path, "speed")["step"] == 2000
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert last_metrics(tmp_path, "speed")["step"] == 1990


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_steps(tmp_path, range(1, 6), tensorboard=True)
    write_steps(tmp_path, range(4, 8), from_step=4, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == list(range(1, 8))


def test_steps_that_are_run_again_replace_what_was_written_of_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for first, last, loss in ((1, 5, 1.0), (3, 6, 2.0)):
            if first > 1:
                writer.go_back(first)
                writer.write_text(first, "recovery", "went back to step 2")
            for step in range(first, last + 1):
                writer.write(step, {"loss": loss, "consumed_sequences": step})
                writer.flush()
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == expected
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == expected
    (text,) = board.Tensors("recovery/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (3, b"went back to step 2")


def test_counts_of_experts_are_taken_back_with_their_steps_and_drawn(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    image = np.full((8, 16, 3), 255, np.uint8)
    with MetricsWriter(tmp_path, experts=True) as writer:
        for step in (10, 20, 30):
            writer.write_experts(step, {"tokens": {"2": [[step]]}}, image)
        writer.go_back(20)
        writer.write_experts(20, {"tokens": {"2": [[7]]}}, image)
    lines = read_metrics(tmp_path, metrics_file.EXPERTS_FILE_NAME)
    assert [(line["step"], line["tokens"]["2"]) for line in lines] == [(10, [[10]]), (20, [[7]])]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.width, event.height) for event in board.Images("experts")] == [(10, 16, 8), (20, 16, 8)]


def test_a_run_without_pillow_goes_on_without_images(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with MetricsWriter(tmp_path, experts=True) as writer:
        for step in (10, 20):
            writer.write_experts(step, {"tokens": {}}, np.full((8, 16, 3), 255, np.uint8))
    assert [line["step"] for line in read_metrics(tmp_path, metrics_file.EXPERTS_FILE_NAME)] == [10, 20]
    assert caplog.text.count("TensorBoard gets no images (pip install pillow)") == 1


@contextlib.contextmanager
def small_files(size):
    """Files cannot grow beyond `size` bytes, as on a full disk; within the test only: pytest writes its output too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
def test_a_full_disk_delays_lines_and_loses_none(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(writer, step):
        writer.write(step, {"loss": 1.0, "consumed_sequences": step})
        writer.flush()

    monkeypatch.setattr(metrics_writer, "RETRY_S", 0.0)
    with MetricsWriter(tmp_path) as writer:
        write(writer, 1)
        with small_files(150):  # in the middle of a line
            write(writer, 2)
            write(writer, 3)
        write(writer, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    # file by file: of two that began in the same second, TensorBoard may take the later one for the earlier
    boards = [EventAccumulator(str(file)).Reload() for file in (tmp_path / "tensorboard").iterdir()]
    seen = [board.Scalars("loss") for board in boards if "loss" in board.Tags()["scalars"]]
    assert {1, 4} <= {event.step for events in seen for event in events}


def test_lines_are_dropped_on_a_full_disk_as_well(tmp_path):
    write_steps(tmp_path, range(1, 6))
    with small_files(0):
        write_steps(tmp_path, [], from_step=3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), bytes_per_token=1) == pytest.approx(8)
    assert bits_per_byte(math.log(2) * 6, bytes_per_token=3) == pytest.approx(2)


def test_loss_by_mask_ratio_is_the_mean_over_masked_positions_of_each_bin():
    bins = MaskRatioLoss()
    ratio = torch.tensor([0.15, 0.12, 1.0, 0.2])
    cross_entropy, masked = torch.tensor([6.0, 2.0, 50.0, 9.0]), torch.tensor([3, 1, 10, 3])
    bins.add(cross_entropy[:2] / ratio[:2], ratio[:2], masked[:2])
    bins.add(cross_entropy[2:] / ratio[2:], ratio[2:], masked[2:])
    means = bins.reduce()
    assert means == pytest.approx({"loss_by_mask_ratio/0.1-0.2": 17 / 7, "loss_by_mask_ratio/0.9-1": 5.0})
    assert bins.reduce() == {}


def test_throughput_relates_tokens_per_second_to_the_peak(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    throughput = Throughput(flops_per_token=50.0)
    throughput.add(8)
    throughput.add(8)
    with throughput.paused():
        now[0] += 7.0
    now[0] += 2.0
    figures = throughput.read(peak_flops=1000.0)
    assert figures == {"tokens_per_second": 8.0, "seconds_per_step": 1.0, "model_flops_utilization": 0.4}
    throughput.add(8, 150.0)  # a step of another pattern
    throughput.add(8)
    now[0] += 2.0
    assert throughput.read(peak_flops=1000.0)["model_flops_utilization"] == 0.8
