"""Damage to a prepared set is noticed: by `llada prepare --verify`, when a run starts, and when it is continued."""

import json
import random
import shutil
from dataclasses import replace

import pytest

from llada_megatron.cli import main
from llada_megatron.launch.data_verification import verify_data
from llada_megatron.llada_moe.data import digests
from llada_megatron.llada_moe.data.set_manifest import prefix_file, read_manifest
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, DataError
from llada_megatron.parallel.training.state import RunState, refuse_changed_run

ENDINGS = (".bin", ".idx", ".bytes", ".repeats")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set in which one document repeats another, in pieces of 1000 bytes."""
    folder = tmp_path_factory.mktemp("digests")
    words = random.Random(0)
    texts = [" ".join(words.choices(["ab", "bc", "cd", "de", "ef"], k=60)) for _ in range(30)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0]]))
    command = ["prepare", str(folder / "a.jsonl"), "--train-tokenizer", "--vocab-size", "280", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "PIECE", 1000)
        assert main([*command, "--output", str(folder / "set")]) == 0
    return folder


@pytest.fixture
def prefix(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "PIECE", 1000)
    for file in prepared.glob("set.*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "set"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def as_of_old(prefix):
    """Make the manifest one of the first version."""
    path = prefix_file(prefix, ".json")
    content = json.loads(path.read_text()) | {"schema": 1}
    for key in ("near_duplicates", "vocabulary_held_out", "digests"):
        del content[key]
    path.write_text(json.dumps(content))


def test_a_whole_set_is_found_whole(prefix, capsys):
    assert main(["prepare", "--verify", str(prefix), "--json"]) == 0
    out = capsys.readouterr().out
    assert "5 files as they were prepared" in out
    assert json.loads(out.splitlines()[-1])["sha256"] == read_manifest(prefix).sha256
    assert len(read_manifest(prefix).digests[".bin"]) > 2


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("where", [0, -1])
def test_a_flipped_bit_is_found(prefix, capsys, ending, where):
    flip(prefix_file(prefix, ending), where)
    assert main(["prepare", "--verify", str(prefix)]) == 1
    assert f"set{ending}: damaged or replaced: bytes " in capsys.readouterr().err


def test_other_lengths_and_other_tokenizers_are_found(prefix, capsys):
    with prefix_file(prefix, ".bytes").open("ab") as file:
        file.write(b"\0" * 1000)
    assert main(["prepare", "--verify", str(prefix)]) == 1
    assert "are not the length that it had" in capsys.readouterr().err
    prefix_file(prefix, ".bytes").write_bytes(prefix_file(prefix, ".bytes").read_bytes()[:-1000])
    flip(prefix_file(prefix, ".tokenizer.model"), 40)
    assert main(["prepare", "--verify", str(prefix)]) == 1
    assert "tokenizer" in capsys.readouterr().err


def test_ranks_share_the_pieces(prefix, make_run):
    flip(prefix_file(prefix, ".bin"), 1500)
    run = make_run([prefix])
    verify_data(run, 0, 2)
    with pytest.raises(DataError, match=r"set\.bin: damaged or replaced: bytes 1,000 to 2,000 are not"):
        verify_data(run, 1, 2)
    verify_data(make_run([prefix], data={"verify": "never"}))


def test_a_set_of_an_earlier_version_is_read_with_a_word(prefix, make_run, capsys):
    as_of_old(prefix)
    verify_data(make_run([prefix]), 1, 2)
    assert not capsys.readouterr().err
    verify_data(make_run([prefix]))
    assert "was prepared by an earlier version: damage to its files cannot be noticed" in capsys.readouterr().err
    assert main(["prepare", "--verify", str(prefix)]) == 1
    assert "without digests to compare with" in capsys.readouterr().err


def test_more_held_out_than_the_vocabulary_was_trained_for(prefix, make_run, capsys):
    verify_data(make_run([prefix], data={"validation_fraction": 0.01}))
    assert not capsys.readouterr().err
    verify_data(make_run([prefix], data={"validation_fraction": 0.02}))
    assert "prepare it with --validation-fraction 0.02" in capsys.readouterr().err


def test_a_run_continues_on_the_set_that_it_began_with(prefix, make_run):
    run = make_run([prefix])

    def state():
        return RunState(run, None, [], None, [read_manifest(prefix)])

    saved = {"sets": state()._sets()}
    assert saved["sets"] == {str(prefix): read_manifest(prefix).sha256}
    state()._require_sets("step-1", saved)
    state()._require_sets("step-1", {})  # saved by an earlier version
    as_of_old(prefix)
    with pytest.raises(CheckpointError, match="prepared again or replaced since then"):
        state()._require_sets("step-1", saved)
    state()._require_sets("step-1", {"sets": {}})


def test_verify_may_change_when_a_run_is_continued(prefix, make_run):
    from llada_megatron.llada_moe.config import to_dict

    run = make_run([prefix])
    refuse_changed_run("step-1", {"run": to_dict(run)}, make_run([prefix], data={"verify": "never"}))
    with pytest.raises(Exception, match=r"data\.validation_fraction was"):
        refuse_changed_run("step-1", {"run": to_dict(run)}, make_run([prefix], data={"validation_fraction": 0.5}))


def test_a_key_newer_than_the_checkpoint_had_its_default_there(prefix, make_run):
    """Else a run could change what its step numbers stand for at the first resume after an update."""
    from llada_megatron.llada_moe.config import to_dict

    saved = to_dict(make_run([prefix]))
    del saved["objective"]["complementary_masks"]
    refuse_changed_run("step-1", {"run": saved}, make_run([prefix]))
    with pytest.raises(Exception, match=r"objective\.complementary_masks was False and is True"):
        refuse_changed_run("step-1", {"run": saved}, make_run([prefix], objective={"complementary_masks": True}))


def test_so_had_a_newer_key_of_its_kind_of_objective_and_one_inside_another(prefix, make_run):
    from llada_megatron.llada_moe.config import to_dict
    from llada_megatron.llada_moe.config.block_schedule import BlockSchedule, BlockStage
    from llada_megatron.llada_moe.config.editing import EditingConfig
    from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig

    schedule = BlockSchedule(stable=BlockStage(block_size=32, tokens=5120))
    run = replace(
        make_run([prefix]),
        objective=BlockDiffusionConfig(kind="block_diffusion", block_size=32, block_schedule=schedule),
    )
    saved = to_dict(run)
    del saved["objective"]["editing"], saved["objective"]["block_schedule"]["autoregressive_tokens"]
    refuse_changed_run("step-1", {"run": saved}, run)
    for change, text in (
        ({"editing": EditingConfig()}, r"objective\.editing was None and is"),
        (
            {"block_schedule": replace(schedule, autoregressive_tokens=512)},
            r"objective\.block_schedule\.autoregressive_tokens was 0 and is 512",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            refuse_changed_run("step-1", {"run": saved}, replace(run, objective=replace(run.objective, **change)))
    saved["objective"]["key_of_a_later_version"] = 1
    with pytest.raises(ConfigError, match=r"objective\.key_of_a_later_version was 1 and is None"):
        refuse_changed_run("step-1", {"run": saved}, run)


@pytest.mark.parametrize("arguments", [("a.txt", "--verify", "set"), ("--verify", "set", "--output", "x"), ("a.txt",)])
def test_what_goes_with_verify_and_what_prepare_needs(arguments, capsys):
    assert main(["prepare", *arguments]) == 2
    assert ("goes alone" if "--verify" in arguments else "needed: INPUT, --output PREFIX") in capsys.readouterr().err
