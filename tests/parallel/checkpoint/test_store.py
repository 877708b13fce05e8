"""The store: what counts as a checkpoint, what happens when a save is killed or cannot be written, resharding."""

import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import distributed as dist

from llada_megatron.llada_moe.errors import CheckpointError, LladaError, ResourceError
from llada_megatron.parallel.checkpoint import manifest as manifests
from tests.ranks import RankFailure, run_ranks

SIZE = 1 << 16


def _state(value, size=SIZE):
    """A tensor split over the ranks, a replicated one, one object per rank and a plain number."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    rank, world = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(size, dtype=torch.float32) + value
    return {
        "split": ShardedTensor.from_rank_offsets("split", whole.chunk(world)[rank].clone(), (0, rank, world)),
        "same": ShardedTensor.from_rank_offsets("same", torch.full((3,), float(value)), replica_id=rank),
        "object": ShardedObject("object", {"value": value}, (1,), (0,), replica_id=rank),
        "number": value,
    }


def _store(root, **options):
    from llada_megatron.parallel.checkpoint.store import CheckpointStore

    return CheckpointStore(root, **options)


def _save(root, steps, keep_last=3, asynchronous=False):
    store = _store(root, keep_last=keep_last, asynchronous=asynchronous)
    for step in steps:
        store.save(step, _state(step), {"step": step, "model": {"width": 4}}, {"kind": "test"})
    store.finish()
    return [child.cmdline() for child in psutil.Process().children(recursive=True)]


def _check(state, value):
    rank, world = dist.get_rank(), dist.get_world_size()
    expected = (torch.arange(SIZE, dtype=torch.float32) + value).chunk(world)[rank]
    assert torch.equal(state["split"], expected) and torch.equal(state["same"], torch.full((3,), float(value)))
    assert state["object"] == {"value": value} and state["number"] == value


def _resume(root):
    """The step found by `latest` (after checking what it holds), and the messages about others."""
    said = []
    store = _store(root, report=said.append)
    path = store.latest()
    if path is None:
        return None, said
    state, metadata = store.load(path, _state(0), {"width": 4})
    _check(state, metadata["step"])
    assert state["content_metadata"] == {"kind": "test"}
    return metadata["step"], said


def _fails(root, action, *arguments):
    """Class and message of the LladaError that this rank gets."""
    try:
        action(root, *arguments)
    except LladaError as error:
        return type(error).__name__, str(error)
    return None


def names(root):
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize(("wrote", "reads"), [(2, 1), (1, 2)])
def test_what_some_ranks_wrote_others_read(tmp_path, wrote, reads):
    run_ranks(_save, wrote, tmp_path, [5])
    assert names(tmp_path) == ["latest", "step-00000005"]
    assert [step for step, _ in run_ranks(_resume, reads, tmp_path)] == [5] * reads


def test_no_process_is_started_and_none_stays(tmp_path):
    began = time.monotonic()
    assert run_ranks(_save, 2, tmp_path, [1, 2]) == [[], []]
    assert time.monotonic() - began < 60
    assert run_ranks(_save, 2, tmp_path, [3], 3, True) == [[], []]


def test_the_last_ones_are_kept_and_leftovers_swept(tmp_path):
    (tmp_path / ".step-00000002.partial-1-2").mkdir(parents=True)
    run_ranks(_save, 1, tmp_path, [1, 2, 3, 4], 2)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000004"]
    assert (tmp_path / "latest").read_text() == "step-00000004\n"


def test_a_reader_leaves_a_save_in_progress_alone(tmp_path):
    run_ranks(_save, 1, tmp_path, [1])
    (tmp_path / ".step-00000002.partial-1-2").mkdir()
    assert run_ranks(_resume, 1, tmp_path)[0][0] == 1
    assert (tmp_path / ".step-00000002.partial-1-2").is_dir()


def _damage(root, step, name, change):
    path = next((root / manifests.step_name(step)).glob(name))
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def _flip(content):
    content[len(content) // 2] ^= 1


def test_damaged_checkpoints_are_skipped_with_a_reason(tmp_path):
    run_ranks(_save, 2, tmp_path, [1, 2, 3, 4], 9)
    _damage(tmp_path, 4, "__1_0.distcp", _flip)
    _damage(tmp_path, 3, ".metadata", lambda content: content.__delitem__(slice(100, None)))
    (tmp_path / "step-00000002/manifest.json").unlink()
    (step, said), (_, other) = run_ranks(_resume, 2, tmp_path)
    assert step == 1 and other == []
    assert "step-00000004/__1_0.distcp does not hold the bytes" in said[0]
    assert "step-00000003/.metadata has 100 bytes instead of" in said[1]
    assert "step-00000002 has no manifest.json" in said[2]
    # the run that fell back replaces the damaged one when it comes to its step; pruning does not count the others
    run_ranks(_save, 2, tmp_path, [2], 2)
    assert names(tmp_path) == ["latest"] + [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert run_ranks(_resume, 1, tmp_path)[0][0] == 2


def _latest(root):
    return _store(root, report=lambda text: None).latest()


def _load(root, path, model):
    _store(root).load(path, _state(0), model)


def _newest_even(root):
    def check(path, metadata):
        if metadata["step"] % 2:
            raise manifests.DamagedCheckpointError(f"{path} is odd")

    said = []
    return _store(root, report=said.append).latest(check=check), said


def test_a_checkpoint_whose_facts_do_not_do_is_passed_over(tmp_path):
    run_ranks(_save, 1, tmp_path, [2, 3])
    ((path, said),) = run_ranks(_newest_even, 1, tmp_path)
    assert path == tmp_path / "step-00000002"
    assert said == [f"skipped a damaged checkpoint: {tmp_path / 'step-00000003'} is odd"]


def test_nothing_usable_is_told_from_nothing_there(tmp_path):
    assert run_ranks(_latest, 1, tmp_path / "new") == [None]
    run_ranks(_save, 1, tmp_path, [1])
    _damage(tmp_path, 1, "__0_0.distcp", _flip)
    kind, text = run_ranks(_fails, 1, tmp_path, _latest)[0]
    assert kind == "CheckpointError" and "no usable checkpoint" in text and "__0_0.distcp" in text


def test_a_checkpoint_that_cannot_be_loaded_is_refused_on_all_ranks(tmp_path):
    run_ranks(_save, 1, tmp_path, [1])
    path = tmp_path / "step-00000001"
    first, second = run_ranks(_fails, 2, tmp_path, _load, path, {"width": 8})
    assert first == second and "width: 4 in the checkpoint, 8 in this run" in first[1]
    first, second = run_ranks(_fails, 2, tmp_path, _load, tmp_path / "step-00000002", None)
    assert first == second and "there is no checkpoint at" in first[1]
    _damage(tmp_path, 1, "__0_0.distcp", _flip)
    first, second = run_ranks(_fails, 2, tmp_path, _load, path, None)
    assert first == second and first[0] == "DamagedCheckpointError"


# --- killed -------------------------------------------------------------------------------------------------

KILL_AT = (
    "rank_writer.write",
    "rank_writer.record",
    "manifest.write",
    "manifest.verify_sizes",
    "retention._give_name",
    "retention.remove",
)


def _kill_at(root, place, after):
    """Save step 1, then be killed in the middle of saving step 2."""
    import importlib

    _save(root, [1], 1)
    module, name = place.split(".")
    module = importlib.import_module(f"llada_megatron.parallel.checkpoint.{module}")
    real = getattr(module, name)

    def killed(*arguments, **options):
        if after:
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, killed)
    _save(root, [2], 1)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", KILL_AT)
def test_a_killed_save_leaves_the_earlier_checkpoint(tmp_path, place, after):
    with pytest.raises(RankFailure, match="-9"):
        run_ranks(_kill_at, 1, tmp_path, place, after)
    ((step, said),) = run_ranks(_resume, 1, tmp_path)
    assert step in (1, 2) and said == []
    assert step == (2 if (place, after) == ("retention._give_name", True) or place == "retention.remove" else 1)
    run_ranks(_save, 1, tmp_path, [3], 1)
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_a_replacement_that_was_killed_puts_the_old_one_back(tmp_path):
    run_ranks(_save, 1, tmp_path, [1])
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.replaced-1")
    run_ranks(_save, 1, tmp_path, [2])
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


# --- asynchronous -------------------------------------------------------------------------------------------


def _save_in_background(root):
    store = _store(root, asynchronous=True)
    state = _state(1)
    live = [state["split"].data, state["same"].data]
    store.save(1, state, {"step": 1, "model": {"width": 4}}, {"kind": "test"})
    published_at_once = (root / "step-00000001").exists()
    for tensor in live:
        tensor.zero_()  # the trainer goes on; what is written must not change
    deadline = time.monotonic() + 60
    while (path := store.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert store.poll() is None and store.finish() is None
    return published_at_once, path


def test_a_background_save_holds_the_state_of_its_step(tmp_path):
    assert run_ranks(_save_in_background, 2, tmp_path) == [(False, tmp_path / "step-00000001")] * 2
    assert [step for step, _ in run_ranks(_resume, 2, tmp_path)] == [1, 1]


def _kill_the_writer(root):
    from llada_megatron.parallel.checkpoint import rank_writer

    _save(root, [1])
    rank_writer.write = lambda *_: time.sleep(60)
    store = _store(root, asynchronous=True)
    store.save(2, _state(2), {"step": 2})
    psutil.Process().children()[0].kill()
    return _fails(root, lambda _: store.finish())


def test_a_killed_writer_fails_the_save_on_all_ranks(tmp_path):
    first, second = run_ranks(_kill_the_writer, 2, tmp_path)
    assert (
        first == second
        and "writing process ended early" in first[1]
        and "earlier checkpoints are untouched" in first[1]
    )
    assert names(tmp_path) == ["latest", "step-00000001"]


def _die_while_writing(root):
    from llada_megatron.parallel.checkpoint import rank_writer

    rank_writer.write = lambda *_: time.sleep(60)
    _store(root, asynchronous=True).save(1, _state(1), {"step": 1})
    Path(root, "writer").write_text(str(psutil.Process().children()[0].pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_does_not_outlive_its_trainer(tmp_path):
    with pytest.raises(RankFailure):
        run_ranks(_die_while_writing, 1, tmp_path)
    writer = int((tmp_path / "writer").read_text())
    deadline = time.monotonic() + 10
    while psutil.pid_exists(writer) and psutil.Process(writer).status() != "zombie":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _ask_without_fork(root):
    from llada_megatron.parallel.checkpoint import rank_writer

    rank_writer.multiprocessing.get_all_start_methods = lambda: ["spawn"]
    said = []
    store = _store(root, asynchronous=True, report=said.append)
    store.save(1, _state(1), {"step": 1})
    return said, (root / "step-00000001").exists()


def test_where_forking_is_impossible_it_writes_synchronously_and_says_why(tmp_path):
    said, published = run_ranks(_ask_without_fork, 1, tmp_path)[0]
    assert published and said == ["checkpoints are written synchronously: linux has no fork()"]


# --- full disk ----------------------------------------------------------------------------------------------


def _save_with_limit(root, limited_rank, asynchronous):
    """The disk takes 100 kB per file from one rank; Python turns the signal into an error."""
    _save(root, [1])
    store = _store(root, asynchronous=asynchronous)
    if dist.get_rank() == limited_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    def save(_):
        store.save(2, _state(2), {"step": 2})
        store.finish()

    return _fails(root, save)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("limited_rank", [0, 1])
def test_a_write_that_fails_on_one_rank_fails_the_save_on_all(tmp_path, limited_rank, asynchronous):
    first, second = run_ranks(_save_with_limit, 2, tmp_path, limited_rank, asynchronous)
    assert first == second and first[0] == "ResourceError"
    assert f"(rank {limited_rank}: File too large" in first[1] and "earlier checkpoints are untouched" in first[1]
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert run_ranks(_resume, 1, tmp_path)[0][0] == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    point = tmp_path / "disk"
    point.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)]
    if mount is None or subprocess.run([mount, *options], capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs privileges")
    yield point
    subprocess.run(["umount", str(point)], check=True)


def _fill(root, size, believe):
    _save(root, [1])
    if believe:  # a quota does not show in the free space
        shutil.disk_usage = lambda path: SimpleNamespace(free=1 << 40)
    return _fails(root, lambda _: _store(root).save(2, _state(2, size), {"step": 2}))


@pytest.mark.parametrize("believe", [False, True], ids=["seen before", "met while writing"])
def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk, believe):
    first, second = run_ranks(_fill, 2, small_disk, 1 << 20, believe)
    assert first == second and first[0] == "ResourceError" and "earlier checkpoints are untouched" in first[1]
    assert ("No space left on device" if believe else "make room") in first[1]
    assert names(small_disk) == ["latest", "step-00000001"]
    assert run_ranks(_resume, 1, small_disk)[0][0] == 1


def _fill_completely(root, name):
    """The tensors fit; the last small files that only rank 0 writes do not."""
    from llada_megatron.parallel.checkpoint import store

    _save(root, [1])

    def full(*_):
        raise OSError(28, "No space left on device", name)

    if name == ".metadata":
        store.rank_writer.FileSystemWriterAsync.finish = full
    else:
        store.manifests.write_durably = full
    return _fails(root, lambda _: _store(root).save(2, _state(2), {"step": 2}))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_disk_that_fills_in_the_last_step_of_rank_0_does_not_hang(tmp_path, name):
    first, second = run_ranks(_fill_completely, 2, tmp_path, name, timeout=30)
    assert first == second and first[0] == "ResourceError" and "No space left on device" in first[1]
    assert names(tmp_path) == ["latest", "step-00000001"]


def _save_read_only(root):
    return _fails(root, lambda _: _store(root).save(1, _state(1), {"step": 1}))


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    first, second = run_ranks(_save_read_only, 2, tmp_path / "file" / "run")
    assert first == second and "Not a directory" in first[1] and str(tmp_path / "file") in first[1]


def test_the_errors_keep_their_exit_codes():
    assert CheckpointError.exit_code == ResourceError.exit_code == 1
