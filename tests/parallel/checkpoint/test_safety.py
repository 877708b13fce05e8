"""A checkpoint that carries a payload is refused, wherever the payload sits, and the payload does not run."""

import io
import os
import pickle
import shutil
import traceback
import zipfile
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.checkpoint import filesystem, metadata

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint import safety
from tests.ranks import run_ranks

OBJECT = "layer._extra_state/shard_0_1"


class Payload:
    """Unpickling an instance makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def _state():
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    return {
        "weight": ShardedTensor.from_rank_offsets("weight", torch.arange(6.0), replica_id=dist.get_rank()),
        "extra": ShardedObject("layer._extra_state", {"scale": 2}, (1,), (0,), replica_id=dist.get_rank()),
        "step": 3,
    }


def _save(root):
    from llada_megatron.parallel.checkpoint.store import CheckpointStore

    CheckpointStore(root).save(3, _state(), {"step": 3})


def _load_each(paths):
    from llada_megatron.parallel.checkpoint.store import CheckpointStore

    store = CheckpointStore(Path(paths[0]).parent / "run")
    outcomes = []
    for path in paths:
        try:
            outcomes.append(repr(store.load(path, _state())[0]["extra"]))
        except CheckpointError as error:
            outcomes.append(str(error))
    return outcomes


def _load_behind_the_check(path, files):
    """Megatron's own load, with the readers guarded but nothing checked before."""
    from megatron.core import dist_checkpointing

    with safety.guarded(Path(path), files):
        try:
            dist_checkpointing.load(_state(), path)
        except BaseException as error:  # torch's CheckpointException is no Exception
            refusal = traceback.format_exception(error)
    assert any("posix.mkdir" in line for line in refusal)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    run_ranks(_save, 1, root)
    return root / "step-00000003"


def read_trusted(directory):
    return pickle.loads((directory / safety.METADATA).read_bytes())


def write_metadata(directory, value):
    (directory / safety.METADATA).write_bytes(value if isinstance(value, bytes) else pickle.dumps(value))


def with_new_hashes(directory):
    """What an attacker does after changing a file."""
    names = [path.name for path in directory.iterdir() if path.name != manifests.FILE_NAME]
    manifests.write(
        directory, manifests.Manifest({"step": 3}, {name: manifests.record(directory / name) for name in names})
    )
    return directory


def poison_metadata(directory, marker):
    found = read_trusted(directory)
    found.planner_data = Payload(marker)
    write_metadata(directory, found)


def poison_object(directory, marker):
    found = read_trusted(directory)
    (index,) = (index for index in found.storage_data if index.fqn == OBJECT)
    place = found.storage_data[index]
    path = directory / place.relative_path
    content = io.BytesIO()
    torch.save([Payload(marker)], content)
    place.offset, place.length = path.stat().st_size, content.tell()
    path.write_bytes(path.read_bytes() + content.getvalue())
    write_metadata(directory, found)


def poison_common(directory, marker):
    torch.save({"step": 3, "args": Payload(marker)}, directory / safety.COMMON)


POISONS = {"metadata": poison_metadata, "object": poison_object, "common": poison_common}


@pytest.fixture
def poisoned(good, tmp_path):
    """The payload's marker, and a checkpoint for each place a payload can sit in."""
    directories = {}
    for name, poison in POISONS.items():
        directories[name] = shutil.copytree(good, tmp_path / name)
        poison(directories[name], tmp_path / "marker")
        with_new_hashes(directories[name])
    return tmp_path / "marker", directories


def test_the_payloads_work_in_the_readers_of_torch(poisoned):
    marker, directories = poisoned
    place = next(p for i, p in read_or_run(directories["object"]).storage_data.items() if i.fqn == OBJECT)
    content = (directories["object"] / place.relative_path).read_bytes()[place.offset :]
    for run in (
        lambda: filesystem.FileSystemReader(directories["metadata"]).read_metadata(),
        lambda: torch.load(io.BytesIO(content), weights_only=False),
        lambda: torch.load(directories["common"] / safety.COMMON, weights_only=False),
    ):
        run()
        assert marker.is_dir()
        marker.rmdir()


def read_or_run(directory):
    return filesystem.FileSystemReader(directory).read_metadata()


@pytest.mark.parametrize("world", [1, 2])
def test_payloads_are_refused_and_do_not_run(good, poisoned, world):
    marker, directories = poisoned
    outcomes = run_ranks(_load_each, world, [str(path) for path in [*directories.values(), good]])
    for outcome in outcomes:
        assert outcome == outcomes[0]  # no rank waits for another
        in_metadata, in_object, in_common, fine = outcome
        assert ".metadata" in in_metadata and "posix.mkdir" in in_metadata
        assert OBJECT in in_object and "posix.mkdir" in in_object
        assert "common.pt" in in_common and "posix.mkdir" in in_common
        assert all("nothing in it was run" in text for text in outcome[:3])
        assert fine == "{'scale': 2}"
    assert not marker.exists()


@pytest.mark.parametrize("name", POISONS)
def test_the_readers_refuse_also_what_no_check_has_seen(poisoned, name):
    marker, directories = poisoned
    run_ranks(_load_behind_the_check, 1, str(directories[name]), os.listdir(directories[name]))
    assert not marker.exists()


def refusal(directory):
    files = manifests.read(with_new_hashes(directory)).files
    with pytest.raises(CheckpointError) as caught:
        safety.refuse_unsafe(directory, files)
    return str(caught.value)


def test_metadata_that_points_elsewhere_is_refused(good, tmp_path):
    for number, wrong in enumerate(("../secret", "/etc/passwd", "absent.distcp")):
        directory = shutil.copytree(good, tmp_path / str(number))
        found = read_trusted(directory)
        next(iter(found.storage_data.values())).relative_path = wrong
        write_metadata(directory, found)
        assert "which is not a file of the checkpoint" in refusal(directory)


def test_metadata_of_other_shapes_is_refused(good, tmp_path):
    def changed(**attributes):
        found = read_trusted(good)
        for name, value in attributes.items():
            setattr(found, name, value)
        return found

    def placed(**attributes):
        found = read_trusted(good)
        vars(next(iter(found.storage_data.values()))).update(attributes)
        return found

    wrong = {
        "does not describe": {"weight": 1},
        "neither a tensor nor an object": changed(state_dict_metadata={"weight": 1}),
        "does not say where": changed(storage_data=None),
        "unknown kind": changed(storage_data={"weight": 1}),
        "impossible position": placed(offset=-1),
        "transformation": placed(transform_descriptors=["zstd"]),
        "is not a description": b"not a pickle",
    }
    for number, (message, value) in enumerate(wrong.items()):
        directory = shutil.copytree(good, tmp_path / str(number))
        write_metadata(directory, value)
        assert message in refusal(directory)


def test_metadata_cannot_change_a_class(good, tmp_path):
    directory = shutil.copytree(good, tmp_path / "1")
    pickled = pickle.dumps(read_trusted(directory), protocol=2)
    # GLOBAL class, BUILD with (None, {"hacked": 1}), POP: pickle's way to set an attribute of the class itself
    change = b"ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\n(N}X\x06\x00\x00\x00hackedK\x01stb0"
    write_metadata(directory, pickled[:2] + change + pickled[2:])
    assert "tries to change a class" in refusal(directory)
    del metadata.BytesStorageMetadata.hacked


def test_other_storage_formats_are_refused(good, tmp_path):
    directory = shutil.copytree(good, tmp_path / "1")
    (directory / safety.CONFIG).write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert "sharded_backend = 'zarr'" in refusal(directory)
    (directory / safety.CONFIG).write_text('{"sharded_backend": "torch_dist", "hook": "x"}')
    assert "hook = 'x'" in refusal(directory)


def test_an_archive_of_code_is_refused(good, tmp_path):
    directory = shutil.copytree(good, tmp_path / "1")
    with zipfile.ZipFile(directory / safety.COMMON, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
        archive.writestr("archive/version", b"3")
    assert "common.pt is more than plain data" in refusal(directory)
