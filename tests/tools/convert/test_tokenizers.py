"""The tokenizer on its way through both conversions: the right one, none, one that names code, one that leads away."""

from __future__ import annotations

import json
import shutil

import pytest

from llada_megatron import cli
from llada_megatron.llada_moe.errors import CheckpointError, DataError
from llada_megatron.parallel.checkpoint.conversion.shard_reader import ShardedReader
from llada_megatron.tools.convert.importer import STEP
from tests.tools.convert.checkpoints import (
    WORDS,
    read,
    tensors_of,
    to_huggingface,
    to_sharded,
    with_tokenizer,
    written,
)

AUTO_MAP = {"auto_map": {"AutoTokenizer": ["someone/repo--tokenization_x.Cls", None]}}


@pytest.fixture
def source(tmp_path):
    """A checkpoint with a tokenizer."""
    return with_tokenizer(written(tmp_path / "source", "tiny-dense"))


def test_the_tokenizer_of_another_training_is_not_exported(source, tmp_path):
    to_sharded(source, tmp_path / "sharded")
    other = tmp_path / "other"
    other.mkdir()
    with_tokenizer(other, f"{WORDS} more")
    for tokenizer in (other, other / "tokenizer.json"):
        with pytest.raises(DataError, match=f"{tokenizer} is not the tokenizer that .* was trained with.*--tokenizer"):
            to_huggingface(tmp_path / "sharded", tmp_path / "exported", tokenizer=tokenizer)
    shutil.copy(other / "tokenizer.json", tmp_path / "sharded/tokenizer")
    with pytest.raises(DataError, match=f"{tmp_path}/sharded/tokenizer is not the tokenizer that"):
        to_huggingface(tmp_path / "sharded", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    to_huggingface(tmp_path / "sharded", tmp_path / "exported", tokenizer=source / "tokenizer.json")
    assert (tmp_path / "exported/tokenizer.json").exists()


def test_without_facts_any_tokenizer_of_the_size_is_exported(source, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    (source / "tokenizer.json").rename(tokenizer)
    to_sharded(source, tmp_path / "sharded")
    assert "AutoTokenizer" not in exported_card(tmp_path, "without", without_tokenizer=True)
    assert "AutoTokenizer" in exported_card(tmp_path, "with", tokenizer=tokenizer)


def test_an_export_without_a_tokenizer_must_be_asked_for(source, tmp_path, capsys):
    to_sharded(source, tmp_path / "sharded")
    words = ["convert", "export", str(tmp_path / "sharded"), str(tmp_path / "exported")]
    assert cli.main([*words, "--without-tokenizer"]) == 0
    assert not list((tmp_path / "exported").glob("tokenizer*")) and "AutoTokenizer" not in card_of(
        tmp_path / "exported"
    )
    shutil.rmtree(tmp_path / "exported")
    (tmp_path / "sharded/tokenizer").rename(tmp_path / "moved")
    assert cli.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"its tokenizer is not at {tmp_path}/sharded/tokenizer/tokenizer.json; say where it is with --tok" in line
    assert "--without-tokenizer" in line and not (tmp_path / "exported").exists()
    assert cli.main([*words, "--tokenizer", str(tmp_path / "moved")]) == 0
    assert (tmp_path / "exported/tokenizer.json").is_file()


def exported_card(folder, name, **options):
    to_huggingface(folder / "sharded", folder / name, **options)
    return card_of(folder / name)


def card_of(exported):
    return (exported / "README.md").read_text()


def test_code_is_told_and_left_out(source, tmp_path):
    (source / "tokenizer_config.json").write_text(json.dumps({**AUTO_MAP, "tokenizer_class": "Cls"}))
    told = f"{source / 'tokenizer_config.json'} names code (auto_map "
    assert any(note.startswith(told) for note in to_sharded(source, tmp_path / "sharded")["notes"])
    notes = to_huggingface(tmp_path / "sharded", tmp_path / "exported")["notes"]
    assert any("names code" in note for note in notes)
    config = json.loads((tmp_path / "exported/tokenizer_config.json").read_text())
    assert "auto_map" not in config and config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_tokenizer_file_that_is_a_link_to_elsewhere_is_refused_at_once(source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("{}")
    name = "chat_template.jinja"
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(elsewhere)
    with pytest.raises((CheckpointError, DataError), match=f"{source / name} is a link to {elsewhere}, outside of"):
        to_sharded(source, tmp_path / "sharded")
    assert not (tmp_path / "sharded").exists() and not list(tmp_path.glob(".sharded*"))


def test_weights_and_their_configuration_may_be_links_to_another_disk(source, tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).rename(tmp_path / "disk" / name)
        (source / name).symlink_to(tmp_path / "disk" / name)
    assert to_sharded(source, tmp_path / "sharded")["tensors"] == len(tensors_of("tiny-dense"))


def test_a_snapshot_of_the_cache_is_read_and_named_by_its_repository(source, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots/0f3a"
    snapshot.mkdir(parents=True)
    source.rename(repository / "blobs")
    for path in (repository / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    to_sharded(snapshot, tmp_path / "sharded")
    metadata = ShardedReader(tmp_path / "sharded" / STEP).manifest.metadata
    assert metadata["imported"]["from"] == "org/name" and metadata["tokenizer"]["vocab_size"] == 15
    to_huggingface(tmp_path / "sharded", tmp_path / "exported")
    assert "were read from `org/name`" in (tmp_path / "exported/README.md").read_text()
    assert read(tmp_path / "exported").keys() == tensors_of("tiny-dense").keys()


# the tokenizer of `source` has its end of text at 2 and its mask at 3, as the model has


def with_ids(source, mask=None, eos=2, name=None):
    """The checkpoint, with other ids in config.json and the mask's name in tokenizer_config.json."""
    config = json.loads((source / "config.json").read_text())
    config |= {"eos_token_id": eos} | ({} if mask is None else {"mask_token_id": mask})
    (source / "config.json").write_text(json.dumps(config))
    if name is not None:
        (source / "tokenizer_config.json").write_text(json.dumps({"mask_token": name}))
    return source


@pytest.mark.parametrize("name", ["<|mask|>", {"content": "<|mask|>"}])
def test_two_mask_tokens_are_told_of(source, tmp_path, name):
    with_ids(source, 9, name=name)
    (note,) = to_sharded(source, tmp_path / "kept")["notes"]
    for told in ("config.json says 9,", "mask token has id 3 (by tokenizer_config.json)", "--mask-token-id 3 would"):
        assert told in note
    assert to_sharded(source, tmp_path / "out", mask_token_id=3)["notes"] == []
    (note,) = to_sharded(source, tmp_path / "other", mask_token_id=9)["notes"]
    assert note.startswith("--mask-token-id is 9, and the tokenizer's mask token has id 3: the model keeps 9")


def test_a_mask_token_that_the_tokenizer_only_seems_to_have_is_noted(source, tmp_path):
    (note,) = to_sharded(with_ids(source, 200), tmp_path / "out")["notes"]
    assert note == (
        "config.json says 200 (no token in the tokenizer), and the tokenizer's mask token has id 3: the model keeps "
        "200; --mask-token-id 3 would take the other one"
    )


def test_the_same_mask_token_in_both_is_not_told(source, tmp_path):
    assert to_sharded(with_ids(source, 3, name="<|mask|>"), tmp_path / "out")["notes"] == []
