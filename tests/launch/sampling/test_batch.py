"""Batches: results are on disk at once, an interruption costs nothing finished, processes change nothing."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llada_megatron.launch.sampling.batch_output import BatchOutput, PartFile, _acquire, part_path, records
from llada_megatron.parallel.sampling.results import Result
from tests.launch.sampling.checkpoints import run_cli, start_cli

METHOD = ["--max-new-tokens", "12", "--temperature", "1", "--seed", "5", "--batch-size", "2"]


@pytest.fixture
def prompts(tmp_path):
    """Prompts of many lengths, two of them wrong."""
    lines = [json.dumps({"text": "ab" * (i % 7), "id": f"p{i}"}) for i in range(24)]
    lines[5] = "broken"
    lines[9] = json.dumps({"text": "a" * 127})
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def without_times(path: Path) -> list[dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for record in found:
        assert record.pop("seconds") > 0
    return found


def result(number: int) -> Result:
    return Result(number, None, "text €", "t", [1, 2], [[2]], False, 1, 2, 0.5)


def test_a_batch_and_what_is_left_beside_it(dense, prompts, tmp_path, capsys):
    output = tmp_path / "deep/out.jsonl"
    code, out, err = run_cli(capsys, "sample", dense, "--prompts", prompts, "--output", output, *METHOD, "--json")
    assert code == 1
    assert f"{prompts}, line 6: not JSON" in err
    assert "127 tokens and 12 new ones = 139; the model takes 128, that is 11 too many" in err
    assert "22/22 prompts" in err
    found = without_times(output)
    assert [record["number"] for record in found] == [n for n in range(1, 25) if n not in (6, 10)]
    assert found[0]["id"] == "p0"
    report = json.loads(out)
    assert report["prompts"] == report["written_now"] == 22
    assert report["passed_over"] == 2
    assert report["new_tokens"] == sum(record["new_tokens"] for record in found)
    assert report["forwards"] == sum(record["forwards"] for record in found)
    assert report["tokens_per_second"] > 0
    assert sorted(path.name for path in output.parent.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_the_same_command_again_writes_what_is_new(dense, prompts, tmp_path, capsys):
    output, command = tmp_path / "out.jsonl", ["sample", dense, "--prompts", prompts, *METHOD]
    run_cli(capsys, *command, "--output", output)
    before = output.read_text()
    lines = prompts.read_text().splitlines()
    lines[5] = json.dumps({"text": "mended"})
    lines[9] = json.dumps({"text": "short"})
    prompts.write_text("\n".join([*lines, json.dumps({"text": "one more"})]))
    code, out, err = run_cli(capsys, *command, "--output", output, "--json")
    assert code == 0
    assert "22 prompts are finished; 3 are left" in err
    assert json.loads(out)["written_now"] == 3
    assert set(before.splitlines()) < set(output.read_text().splitlines())
    other = tmp_path / "other.jsonl"
    run_cli(capsys, *command, "--output", other)
    assert without_times(output) == without_times(other)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--seed", "6"], "seed 5 then, 6 now"),
        (["--preset", "fast-dllm"], "preset None then, 'fast-dllm' now"),
        (["schedule.steps=6"], "overrides {} then, {'schedule.steps': '6'} now"),
        (["--edit", "0:1"], "prompt 1, 2"),
    ],
)
def test_another_request_is_not_mixed_in(dense, prompts, tmp_path, capsys, change, text):
    prompts.write_text('{"text": "a<mask>"}\n{"text": "b<mask>"}\n')
    output, command = tmp_path / "out.jsonl", ["sample", dense, "--prompts", prompts, *METHOD]
    assert run_cli(capsys, *command, "--output", output)[0] == 0
    before = output.read_text()
    code, _, err = run_cli(capsys, *command, "--output", output, *change)
    assert code == 1
    assert text in err
    assert "--overwrite" in err
    assert output.read_text() == before
    assert run_cli(capsys, *command, "--output", output, *change, "--overwrite")[0] == 0


def test_another_checkpoint_and_a_file_of_someone_else(dense, mute, prompts, tmp_path, capsys):
    prompts.write_text('{"tokens": [20]}\n')
    output = tmp_path / "out.jsonl"
    command = ["--prompts", prompts, "--output", output, "--max-new-tokens", 2]
    output.write_text("notes\n")
    code, _, err = run_cli(capsys, "sample", dense, *command)
    assert code == 1
    assert "exists, but out.jsonl.run.json beside it" in err
    assert output.read_text() == "notes\n"
    output.unlink()
    assert run_cli(capsys, "sample", dense, *command)[0] == 0
    code, _, err = run_cli(capsys, "sample", mute, *command)
    assert code == 1
    assert "checkpoint" in err and "another request" in err


def interrupted(dense, prompts: Path, output: Path, number: int, *options: str) -> tuple[int, str]:
    """Start a batch, send its process a signal once some results are on disk; exit code and standard error."""
    running = start_cli("sample", dense, "--prompts", prompts, "--output", output, *METHOD, *options)
    until = time.monotonic() + 120
    while time.monotonic() < until and running.poll() is None:
        if sum(part.read_bytes().count(b"\n") for part in output.parent.glob(f"{output.name}.part-*")) >= 3:
            running.send_signal(number)
            break
        time.sleep(0.01)
    return running.wait(timeout=60), running.stderr.read()


@pytest.fixture
def many(tmp_path):
    """So many prompts that an interruption comes in between."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": "ab" * (i % 9)}) + "\n" for i in range(120)))
    return path


def test_a_killed_batch_goes_on_to_the_same_file(dense, many, tmp_path, capsys):
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    code, _ = interrupted(dense, many, output, signal.SIGKILL)
    assert code == -signal.SIGKILL
    part = part_path(output, 0)
    finished = {record["number"] for record, _ in records(part)}
    assert 3 <= len(finished) < 120
    with part.open("ab") as stream:
        stream.write(b'{"number": 299, "text": "torn o')
    code, out, _ = run_cli(capsys, "sample", dense, "--prompts", many, "--output", output, *METHOD, "--json")
    assert code == 0
    assert json.loads(out)["written_now"] == 120 - len(finished)
    run_cli(capsys, "sample", dense, "--prompts", many, "--output", whole, *METHOD)
    assert without_times(output) == without_times(whole)
    assert not part.exists()


def test_ctrl_c_says_how_to_go_on(dense, many, tmp_path):
    output = tmp_path / "out.jsonl"
    code, err = interrupted(dense, many, output, signal.SIGINT)
    assert code == 130
    assert "of 120 prompts are finished and on disk; the same command goes on" in err
    assert "Traceback" not in err
    assert 3 <= len(list(records(part_path(output, 0)))) < 120


def test_two_processes_write_the_same_file(dense, prompts, tmp_path, capfd):
    run_cli(capfd, "sample", dense, "--prompts", prompts, "--output", tmp_path / "one.jsonl", *METHOD)
    output, layout = tmp_path / "two.jsonl", "layout.data_parallel=2"
    code, _, err = run_cli(capfd, "sample", dense, "--prompts", prompts, "--output", output, *METHOD, layout)
    assert code == 1, err
    assert "22/22 prompts" in err
    assert without_times(output) == without_times(tmp_path / "one.jsonl")
    assert not output.with_name(output.name + ".logs").exists()


def test_ranks_of_a_job_that_was_started(dense, prompts, tmp_path, capsys):
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join(lines[:5] + lines[6:9]))  # none that is passed over
    run_cli(capsys, "sample", dense, "--prompts", prompts, "--output", tmp_path / "one.jsonl", *METHOD)
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llada_megatron.cli"]
    arguments = ["sample", str(dense), "--prompts", str(prompts), "--output", str(tmp_path / "two.jsonl"), *METHOD]
    done = subprocess.run(
        [sys.executable, *program, *arguments, "layout.data_parallel=2", "--json"],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written_now"] == 8
    assert without_times(tmp_path / "two.jsonl") == without_times(tmp_path / "one.jsonl")
    assert not (tmp_path / "two.jsonl.logs").exists()


def test_processes_that_are_interrupted_go_on_in_one(dense, many, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    code, err = interrupted(dense, many, output, signal.SIGINT, "layout.data_parallel=2")
    assert code == 130
    assert "of 120 prompts are finished and on disk" in err
    finished = sum(1 for part in (0, 1) for _ in records(part_path(output, part)))
    code, out, _ = run_cli(capsys, "sample", dense, "--prompts", many, "--output", output, *METHOD, "--json")
    assert code == 0
    assert json.loads(out)["written_now"] == 120 - finished
    run_cli(capsys, "sample", dense, "--prompts", many, "--output", tmp_path / "whole.jsonl", *METHOD)
    assert without_times(output) == without_times(tmp_path / "whole.jsonl")


def test_two_batches_do_not_write_one_file(dense, prompts, tmp_path, capsys):
    import fcntl

    output = tmp_path / "out.jsonl"
    with (tmp_path / "out.jsonl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = run_cli(capsys, "sample", dense, "--prompts", prompts, "--output", output)
    assert code == 1
    assert "another process is writing" in err


def test_a_lock_that_its_owner_just_removed_is_none(tmp_path):
    output = BatchOutput(tmp_path / "out.jsonl")
    path = tmp_path / "out.jsonl.lock"
    with path.open("w") as lock:
        path.unlink()
        path.touch()
        assert not _acquire(lock, path)
    with output.locked():
        assert path.exists()
    assert not path.exists()


def test_a_disk_that_is_full(dense, prompts, tmp_path, capsys, monkeypatch):
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join(lines[:5] + lines[6:9]))
    output, command = tmp_path / "out.jsonl", ["sample", dense, "--prompts", prompts, *METHOD]
    append, before = PartFile.append, resource.getrlimit(resource.RLIMIT_FSIZE)

    def append_with_little_room(part: PartFile, result: Result) -> None:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
            append(part, result)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as changed:
        changed.setattr(PartFile, "append", append_with_little_room)
        code, _, err = run_cli(capsys, *command, "--output", output)
    assert code == 1
    assert f"error: {output}.part-0 cannot be written: File too large" in err
    finished = len(list(records(part_path(output, 0))))
    assert f"failed: {finished} of 8 prompts are finished and on disk; the same command goes on" in err
    assert 0 < finished < 8
    assert not part_path(output, 0).read_bytes().endswith(b"\n")  # the last line is torn
    assert run_cli(capsys, *command, "--output", output)[0] == 0
    run_cli(capsys, *command, "--output", tmp_path / "whole.jsonl")
    assert without_times(output) == without_times(tmp_path / "whole.jsonl")


def test_files_that_are_no_parts_are_left_alone(dense, prompts, tmp_path, capsys):
    prompts.write_text('{"text": "a"}\n')
    output, backup = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part-0.backup"
    backup.write_text("mine\n")
    assert run_cli(capsys, "sample", dense, "--prompts", prompts, "--output", output, *METHOD)[0] == 0
    assert backup.read_text() == "mine\n"


def test_a_batch_holds_on_to_its_checkpoint(dense, prompts, tmp_path, capsys, monkeypatch):
    run, begin = tmp_path / "run", BatchOutput.begin
    shutil.copytree(dense, run)
    first, newer = (run / f"checkpoints/step-{number:08}" for number in (0, 9))

    def begin_while_a_training_goes_on(*arguments):
        shutil.copytree(first, newer)
        return begin(*arguments)

    monkeypatch.setattr(BatchOutput, "begin", begin_while_a_training_goes_on)
    prompts.write_text('{"text": "a"}\n')
    code, out, _ = run_cli(
        capsys, "sample", run, "--prompts", prompts, "--output", tmp_path / "out.jsonl", *METHOD, "--json"
    )
    assert code == 0
    assert newer.exists()
    assert json.loads(out)["checkpoint"] == str(first)


def test_a_part_goes_on_behind_its_last_whole_line(tmp_path):
    path = part_path(tmp_path / "out", 0)
    for torn in (b"", b'{"number"', b"\xe2\x82"):
        before = path.read_bytes() if path.exists() else b""
        path.write_bytes(before + torn)
        part = PartFile(path)
        part.append(result(7))
        part.close()
    assert [record for record, _ in records(path)] == [result(7).record()] * 3
    assert Result.of(result(7).record()) == result(7)
    assert os.path.getsize(path) == [offset for _, offset in records(path)][-1]


@pytest.mark.parametrize("output", ["in.jsonl", "in", "link.jsonl"])
def test_prompts_are_not_overwritten(dense, prompts, tmp_path, capsys, output):
    """Not by the results, by a file beside them, nor through a link."""
    (tmp_path / "link.jsonl").symlink_to(prompts)
    source = prompts.rename(tmp_path / "in.run.json") if output == "in" else prompts
    before = source.read_bytes()
    command = ["--prompts", source, "--output", tmp_path / output, "--overwrite"]
    code, _, err = run_cli(capsys, "sample", dense, *command, *METHOD)
    assert code == 2
    assert "this command reads; name another place" in err
    assert source.read_bytes() == before


def test_results_do_not_go_among_the_files_of_the_model(dense, prompts, capsys):
    step, tokenizer = next((dense / "checkpoints").iterdir()), dense / "tokenizer/tokenizer.json"
    before = tokenizer.read_bytes()
    for output, why in (
        (step / "out.jsonl", "lies in the checkpoint"),
        (tokenizer, "is a file that this command reads"),
    ):
        options = ["--prompts", prompts, "--output", output, "--overwrite"]
        code, _, err = run_cli(capsys, "sample", dense, *options, *METHOD)
        assert code == 2 and why in err
    assert tokenizer.read_bytes() == before and not list(step.glob("out*"))
