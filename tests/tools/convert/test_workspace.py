"""The directory in which an output grows: what it trusts, what it removes, where it can be."""

import errno
import fcntl
import os
import resource
import shutil
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, ResourceError
from llada_megatron.tools.convert import target, workspace
from llada_megatron.tools.convert.tasks import workers_for_files
from llada_megatron.tools.convert.workspace import Workspace
from tests.tools.convert.checkpoints import to_huggingface, to_sharded, written

PLAN = {"direction": "import", "source": "a", "files": {"x": 1}}


def write(work, task, name, content=b"content"):
    path = work.output / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    work.finish(task, {"task": task}, [path])


def published(place, plan=PLAN):
    """A target that is finished, with everything beside it that is removed at the very end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "_clean", lambda self: None)
        with Workspace(place, plan) as work:
            write(work, 0, "sub/file")
            work.publish()
    return work.root


# --- what it trusts -------------------------------------------------------------------------------------------


def test_a_record_counts_while_its_files_have_their_sizes(tmp_path, capsys):
    with Workspace(tmp_path / "out", PLAN) as work:
        for task, name in enumerate(("kept", "cut", "gone")):
            write(work, task, f"step/{name}")
        work.finish(3, "checked", [])
        (work.output / "step/cut").write_bytes(b"cont")
        (work.output / "step/gone").unlink()
        (work.output / "step/of an open task").write_bytes(b"content")
    with Workspace(tmp_path / "out", PLAN) as work:
        assert work.resume() == {0: {"task": 0}, 3: "checked"}
        assert [path.name for path in (work.output / "step").iterdir()] == ["kept"]
    assert capsys.readouterr().err == "files of 2 finished parts are gone or cut: these are done again\n"


def test_names_of_files_reach_the_storage_before_the_record(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(workspace, "sync_directory", lambda path: order.append(path.name))
    monkeypatch.setattr(workspace, "write_durably", lambda path, content: (order.append(path.name), path.touch()))
    with Workspace(tmp_path / "out", PLAN) as work:
        order.clear()
        write(work, 5, "step/file")
    assert set(order[:3]) == {"step", "output", ".out.converting"} and order[3:] == ["5.new", "journal"]


def test_the_space_of_what_is_not_finished_is_not_missed(tmp_path, monkeypatch):
    source = written(tmp_path / "source", "tiny-dense")
    with Workspace(tmp_path / "out", PLAN) as work:
        (work.output / "left").write_bytes(bytes(10**6))
    size = sum(path.stat().st_size for path in source.iterdir())

    def usage(root):
        used = sum(path.stat().st_size for path in Path(root).rglob("*") if path.is_file())
        return shutil._ntuple_diskusage(0, 0, 10**6 + size // 2 - used)

    monkeypatch.setattr(workspace.shutil, "disk_usage", usage)
    with Workspace(tmp_path / "out", PLAN) as work:
        work.resume()
        work.require_space(size // 4)
        with pytest.raises(ResourceError, match="make room and repeat the command"):
            work.require_space(10**6 + size)


# --- its end --------------------------------------------------------------------------------------------------


def test_a_target_that_is_finished(tmp_path):
    root = published(tmp_path / "out")
    assert root.exists()
    with Workspace(tmp_path / "out", PLAN) as work:
        assert work.complete
        work.publish()
    assert not root.exists() and (tmp_path / "out/sub/file").read_bytes() == b"content"


@pytest.mark.parametrize("damage", ["emptied", "removed", "file gone", "file cut"])
def test_a_target_that_was_finished_and_is_not_any_more(tmp_path, damage):
    published(tmp_path / "out")
    file = tmp_path / "out/sub/file"
    if damage == "file cut":
        file.write_bytes(b"")
    else:
        file.unlink()
    if damage in ("emptied", "removed"):
        file.parent.rmdir()
    if damage == "removed":
        (tmp_path / "out").rmdir()
    if damage.startswith("file"):
        with pytest.raises(ConfigError, match="not empty"):
            Workspace(tmp_path / "out", PLAN)
        assert not (tmp_path / ".out.converting").exists()
        return
    with Workspace(tmp_path / "out", PLAN) as work:
        assert not work.complete and work.resume() == {}


def test_another_conversion_to_a_finished_target(tmp_path):
    root = published(tmp_path / "out")
    with pytest.raises(ConfigError, match="not empty"):
        Workspace(tmp_path / "out", PLAN | {"source": "b"})
    assert not root.exists()


def test_every_state_of_the_last_removal(tmp_path, monkeypatch):
    stops, real = 0, os.unlink
    for stop in range(1, 20):
        root = published(tmp_path / "out")
        calls = iter(range(1, 1000))

        def unlink(path, *arguments, calls=calls, stop=stop, **options):
            if next(calls) == stop:
                raise SystemExit
            real(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            patch.setattr(target.Lock, "release", lambda self: self._stream.close())
            try:
                with Workspace(tmp_path / "out", PLAN) as work:
                    work.publish()
            except SystemExit:
                stops += 1
        try:
            with Workspace(tmp_path / "out", PLAN) as work:
                assert work.complete
                work.publish()
        except ConfigError:
            pass  # nothing but the lock was left
        assert not root.exists()
        assert (tmp_path / "out/sub/file").exists()
        shutil.rmtree(tmp_path / "out")
    assert stops >= 3


# --- where it can be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    to_sharded(written(tmp_path / "source", "tiny-dense"), tmp_path / "out")
    assert "no locks on this file system" in capsys.readouterr().err and (tmp_path / "out").exists()


def test_a_lock_that_is_held_or_fails(tmp_path, monkeypatch):
    with Workspace(tmp_path / "out", PLAN), pytest.raises(ResourceError, match="another process is converting"):
        Workspace(tmp_path / "out", PLAN)
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CheckpointError, match="cannot be made .Input/output error"):
        Workspace(tmp_path / "out", PLAN)


@pytest.mark.parametrize("words", [["import"], ["export", "--without-tokenizer"]])
def test_the_root_directory(words, tmp_path, capsys):
    source = written(tmp_path / "source", "tiny-dense")
    to_sharded(source, tmp_path / "run")
    place = {"import": source, "export": tmp_path / "run"}[words[0]]
    assert cli.main(["convert", *words, str(place), "/"]) == 2
    assert "/ is a mount point, which cannot be replaced: name a new directory in it" in capsys.readouterr().err


def test_a_name_that_is_too_long(tmp_path, capsys):
    source = written(tmp_path / "source", "tiny-dense")
    to_sharded(source, tmp_path / "run")
    for place, convert in ((source, to_sharded), (tmp_path / "run", to_huggingface)):
        for length in (245, 255, 300):
            with pytest.raises(CheckpointError, match="name of the target is too long: .*choose a shorter one"):
                convert(place, tmp_path / ("n" * length))


def test_a_parent_that_cannot_be_written(tmp_path, monkeypatch):
    def mkdir(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)  # root may write everywhere
    with pytest.raises(CheckpointError, match=r"cannot be made \(Permission denied\): .* that you may write to"):
        Workspace(tmp_path / "out", PLAN)


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    source = written(tmp_path / "source", "tiny-dense")
    with pytest.raises(CheckpointError, match="name a target in another directory"):
        to_sharded(source, tmp_path / "file/out")


# --- open files -----------------------------------------------------------------------------------------------


def test_the_limit_of_open_files_is_raised_or_there_are_fewer_workers(monkeypatch, capsys):
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.__setitem__(slice(2), list(pair)))
    assert workers_for_files(8, 16, 100) == 8 and limits == [1024, 4096]
    assert workers_for_files(8, 128, 32) == 8 and limits == [8 * 128 + 32 + 64, 4096]
    assert capsys.readouterr().err == ""
    assert workers_for_files(8, 1024, 32) == 3 and limits == [4096, 4096]
    assert "3 workers instead of 8: each may write 1024 files at a time" in capsys.readouterr().err
    assert workers_for_files(8, 10**6, 32) == 1
