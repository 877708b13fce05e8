"""The manifest alone: what it refuses, and that reading it needs no torch."""

import json
import subprocess
import sys

import pytest

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError, FileRecord, Manifest

MODEL = {"hidden_size": 64, "moe": {"num_experts": 8, "top_k": 2}, "tie_embeddings": False}


def make(directory, contents=(("a.distcp", b"abc"), ("b.distcp", b""))):
    directory.mkdir(parents=True)
    for name, content in contents:
        (directory / name).write_bytes(content)
    files = {name: manifests.record(directory / name) for name, _ in contents}
    manifests.write(directory, Manifest({"step": 7, "model": MODEL}, files))
    return directory


def read_whole(directory):
    manifest = manifests.read(directory)
    manifests.verify_sizes(directory, manifest)
    return manifest


def test_what_is_written_is_read(tmp_path):
    manifest = read_whole(make(tmp_path / "step-00000007"))
    assert manifest.metadata == {"step": 7, "model": MODEL}
    assert manifest.files["a.distcp"] == FileRecord(3, manifests.hashlib.sha256(b"abc").hexdigest())
    assert manifests.verify_digest(tmp_path / "step-00000007", "a.distcp", manifest.files["a.distcp"]) is None


def test_damage_is_named(tmp_path):
    def fault(name, change):
        directory = make(tmp_path / name)
        change(directory)
        with pytest.raises(DamagedCheckpointError) as caught:
            read_whole(directory)
        return str(caught.value)

    assert "was not completed" in fault("1", lambda d: (d / "manifest.json").unlink())
    assert "cannot be read" in fault("2", lambda d: (d / "manifest.json").write_text('{"schema": 1, "fac'))
    assert "cannot be read" in fault("3", lambda d: (d / "manifest.json").write_text("[" * 100_000))
    assert "a.distcp is missing" in fault("4", lambda d: (d / "a.distcp").unlink())
    assert "2 bytes instead of 3" in fault("5", lambda d: (d / "a.distcp").write_bytes(b"ab"))
    assert "was added after" in fault("6", lambda d: (d / "common.pt").write_bytes(b""))
    text = fault("7", lambda d: (d / "manifest.json").write_text((d / "manifest.json").read_text().replace("64", "65")))
    assert "was changed after" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"facts": []}, "its facts and files are no tables"),
        ({"files": ["a.distcp"]}, "its facts and files are no tables"),
        ({"facts": {"step": "7"}}, "its fact 'step' cannot be '7'"),
        ({"facts": {"step": True}}, "its fact 'step' cannot be 'True'"),
        ({"facts": {"step": -1}}, "is no count"),
        ({"facts": {"consumed_samples": 10**400}}, "is no count"),
        ({"facts": {"model": [1]}}, "its fact 'model' cannot be"),
        ({"facts": {"tokenizer": "x"}}, "its fact 'tokenizer' cannot be 'x'"),
        ({"files": {"a.distcp": 3}}, "its file 'a.distcp' has no size and SHA-256"),
        ({"files": {"a.distcp": {"size": "3", "sha256": "0" * 64}}}, "has no size and SHA-256"),
        ({"files": {"a.distcp": {"size": 3, "sha256": "x"}}}, "has no size and SHA-256"),
    ],
)
def test_wrong_types_under_a_valid_digest_are_damage(tmp_path, change, said):
    directory = make(tmp_path / "step-00000007")
    body = json.loads((directory / "manifest.json").read_text()) | change
    body.pop("sha256")
    (directory / "manifest.json").write_text(json.dumps(body | {"sha256": manifests._self_digest(body)}))
    with pytest.raises(DamagedCheckpointError, match=said):
        manifests.read(directory)


def test_changed_bytes_of_the_same_size_are_found(tmp_path):
    directory = make(tmp_path / "step-00000007")
    manifest = read_whole(directory)
    (directory / "a.distcp").write_bytes(b"abd")
    assert "SHA-256 differs" in manifests.verify_digest(directory, "a.distcp", manifest.files["a.distcp"])


def test_a_newer_schema_is_not_taken_for_damage(tmp_path):
    directory = make(tmp_path / "step-00000007")
    body = json.loads((directory / "manifest.json").read_text()) | {"schema": 99}
    (directory / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="schema 99") as caught:
        manifests.read(directory)
    assert not isinstance(caught.value, DamagedCheckpointError)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "", "sub/file", "manifest.json", "a\\b"])
def test_names_that_leave_the_directory_are_refused(tmp_path, name):
    directory = tmp_path / "step-00000007"
    directory.mkdir()
    manifests.write(directory, Manifest({}, {name: FileRecord(0, "")}))
    with pytest.raises(CheckpointError, match="not a file of the checkpoint"):
        manifests.read(directory)


def test_another_model_is_refused_with_the_keys_that_differ(tmp_path):
    metadata = {"model": MODEL}
    manifests.require_model(tmp_path, metadata, MODEL)
    other = {**MODEL, "hidden_size": 128, "moe": {"num_experts": 16, "top_k": 2}}
    with pytest.raises(CheckpointError) as caught:
        manifests.require_model(tmp_path, metadata, other)
    assert "hidden_size: 64 in the checkpoint, 128 in this run" in str(caught.value)
    assert "moe.num_experts: 8 in the checkpoint, 16 in this run" in str(caught.value)
    assert "top_k" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"moe\.num_experts: 8 in the checkpoint, absent in this run"):
        manifests.require_model(tmp_path, metadata, {**MODEL, "moe": None})


def test_steps_are_numbers_not_text(tmp_path):
    for name in ("step-00000002", "step-100000000", "step-00000010", "step-x", ".step-00000011.partial-1", "latest"):
        (tmp_path / name).mkdir()
    assert [step for step, _ in manifests.steps(tmp_path)] == [100_000_000, 10, 2]
    assert manifests.steps(tmp_path / "absent") == []


def test_reading_needs_no_torch(tmp_path):
    make(tmp_path / "step-00000007")
    program = (
        "import sys, pathlib; from llada_megatron.parallel.checkpoint import manifest, search; "
        "path = pathlib.Path(sys.argv[1]); found = manifest.read(path); manifest.verify_sizes(path, found); "
        "print(found.metadata['step']); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, tmp_path / "step-00000007"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "7\n"
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        manifests.read(tmp_path / "absent")


def test_hashing_tells_how_far_it_is(tmp_path):
    (tmp_path / "file").write_bytes(bytes(3 * 2**20 + 5))
    counts = []
    found = manifests.record(tmp_path / "file", counts.append)
    assert sum(counts) == found.size == 3 * 2**20 + 5 and len(counts) == 4
