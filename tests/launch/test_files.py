"""A file that two processes want to make is made once and whole, also where there are no hard links."""

import errno
import os

import pytest

from llada_megatron.launch.cluster.job import JobDirectory, Verdict
from llada_megatron.launch.files import make_once, replace


@pytest.fixture(params=["links", "no links"])
def storage(request, monkeypatch, tmp_path):
    def refuse(source, target):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)
    return tmp_path


def test_the_first_to_make_a_file_wins(storage):
    assert make_once(storage / "one", "first")
    assert not make_once(storage / "one", "second")
    assert {path.name: path.read_text() for path in storage.iterdir()} == {"one": "first"}


def test_the_first_verdict_stays(storage):
    job = JobDirectory(storage)
    job.write_verdict(0, Verdict("exclude", "all\non n2", ("n2",)))
    job.write_verdict(0, Verdict("requeue", "later"))
    assert job.read_verdict(0) == Verdict("exclude", "all on n2", ("n2",))


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    (tmp_path / "folder").mkdir()
    replace(tmp_path / "one", "first")
    replace(tmp_path / "one", "second")
    with pytest.raises(OSError, match="folder"):
        replace(tmp_path / "folder", "text")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "folder"}
    assert (tmp_path / "one").read_text() == "second"
