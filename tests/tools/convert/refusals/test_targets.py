"""Targets that a conversion refuses, and disks that are too small."""

import os
import resource
import shutil
import subprocess

import pytest

from llada_megatron import cli
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, ResourceError
from tests.tools.convert.checkpoints import to_huggingface, to_sharded


def test_a_target_that_is_not_empty(source, tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    to_sharded(source, target)  # empty: it is taken
    for convert, origin in ((to_sharded, source), (to_huggingface, target)):
        with pytest.raises(ConfigError, match=r"out is not empty \(it holds 'checkpoints'\): name a new directory"):
            convert(origin, target)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; name a new directory"):
        to_sharded(source, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be made"):
        to_sharded(source, tmp_path / "file/out")
    with pytest.raises(ConfigError, match="not empty"):
        to_sharded(source, source)
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    monkeypatch.setattr(type(target), "is_mount", lambda path: True)
    with pytest.raises(ConfigError, match="mount point"):
        to_sharded(source, tmp_path / "mounted")


def test_a_link_to_an_empty_directory_is_filled(source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    to_sharded(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/model.yaml").exists()


def test_no_space_is_known_before_the_first_byte(source, imported, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    for convert, origin in ((to_sharded, source), (to_huggingface, imported)):
        with pytest.raises(
            ResourceError, match=r"out needs \S+ GB more and the disk has \S+ GB free: make room and repeat"
        ):
            convert(origin, tmp_path / f"{convert.__name__}-out")
    assert not [path for path in tmp_path.rglob(".to_*/**/*") if path.suffix in (".distcp", ".safetensors")]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (it takes root)")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up(source, imported, tmp_path, small_disk, monkeypatch):
    free = shutil._ntuple_diskusage(10**12, 0, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)  # others may take what was free
    for convert, origin in ((to_sharded, source), (to_huggingface, imported)):
        with pytest.raises(ResourceError, match="no space left to write .*disk/.*No space left on device"):
            convert(origin, small_disk / "out", workers=2)
        assert not (small_disk / "out").exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
        convert(origin, small_disk / "out")  # goes on
        shutil.rmtree(small_disk / "out")
        subprocess.run(["mount", "-o", "remount,size=256k", str(small_disk)], check=True)


def test_a_file_that_may_not_grow(source, imported, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        for words, origin in ((["import"], source), (["export", "--without-tokenizer"], imported)):
            assert cli.main(["convert", *words, str(origin), str(tmp_path / "out")]) == 1
            message = capsys.readouterr().err.splitlines()[-1]
            assert message.startswith("error: ") and "File too large" in message and "defect" not in message
            assert "__0_0.distcp" in message or "model.safetensors" in message
            shutil.rmtree(tmp_path / ".out.converting")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
