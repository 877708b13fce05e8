"""Wrong input to a conversion: the message names what is wrong and what to do, and nothing is left at the target."""

import json
import os
import re
import resource
import shutil
import subprocess
import time

import pytest
import torch

from llada_megatron import cli
from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, ResourceError
from llada_megatron.tools.convert import parse_size
from llada_megatron.tools.convert.findings import is_padding
from llada_megatron.tools.convert.opening import open_source
from tests.tools.convert.checkpoints import (
    INDEX,
    bits,
    config_of,
    differing,
    files_of,
    read,
    tensors_of,
    to_huggingface,
    to_sharded,
    write,
    written,
)

GATE = "model.layers.1.mlp.gate.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path):
    """A LLaDA-MoE of three files with an index."""
    return written(tmp_path / "source", "tiny-moe-softmax", files=3)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    root = tmp_path_factory.mktemp("imported")
    to_sharded(written(root / "source", "tiny-moe-softmax"), root / "sharded", "expert_parallel=2")
    return root / "sharded"


@pytest.fixture
def sharded(imported, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(imported, tmp_path / "sharded")


def refused(source, *parts, error=CheckpointError, convert=to_sharded, **options):
    """The message of a conversion that is refused, which holds each part and leaves no target."""
    target = source.with_name("target")
    with pytest.raises(error) as caught:
        convert(source, target, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert not target.exists()
    return message


def changed(directory, **values):
    """Other values in `config.json`; None removes the key."""
    config = config_of("tiny-moe-softmax") | values
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return directory


def rewritten(source, change, name="tiny-moe-softmax"):
    """The checkpoint with `change` made to a copy of its tensors."""
    shutil.rmtree(source)
    tensors = dict(tensors_of(name))
    change(tensors)
    return write(source, tensors, config_of(name), files=3)


# --- files ----------------------------------------------------------------------------------------------------


def test_a_missing_shard(source):
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(
        source, "model-00002-of-00003.safetensors is missing", "it holds tensor 'model.", "download or copy it again"
    )


def test_a_truncated_file(source):
    path = source / "model-00003-of-00003.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 5)
    refused(source, str(path), "is truncated", "is cut off", "again")


def test_an_index_that_lies(source):
    index = json.loads((source / INDEX).read_text())
    places = index["weight_map"]
    other = places[GATE]
    claimed = next(file for file in sorted(places.values()) if file != other)
    places[GATE] = claimed
    (source / INDEX).write_text(json.dumps(index))
    refused(source, INDEX, repr(GATE), f"is in {claimed}, which does not hold it", f"{other} holds")
    del places[GATE]
    (source / INDEX).write_text(json.dumps(index))
    refused(source, f"{other} holds tensor {GATE!r}", "does not name")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "x\0y"])
def test_names_that_point_outside(source, name):
    (source.parent / "secret.safetensors").write_bytes(b"")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][GATE] = name
    (source / INDEX).write_text(json.dumps(index))
    refused(source, INDEX, repr(GATE), repr(name), "not a file of this directory: refused", "a source you trust")


def test_pickles(source):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(source, "holds only pickles (pytorch_model.bin)", "save_pretrained, which writes safetensors")
    index = {"weight_map": {GATE: "pytorch_model.bin"}}
    (source / INDEX).write_text(json.dumps(index))
    refused(source, "'pytorch_model.bin'", "only .safetensors files are read", "save_pretrained")


def test_pickles_alone(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refused(tmp_path / "source", "holds only pickles (pytorch_model.bin)", "write it with save_pretrained")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_source(tmp_path / "source")


def test_pickles_beside_a_sharded_checkpoint(sharded):
    (sharded / "notes.pt").write_bytes(b"\x80\x04.")
    for directory in (sharded, sharded / "checkpoints/step-00000000"):
        assert open_source(directory).kind == "sharded, step 0"
    (sharded / "checkpoints/step-00000000/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        open_source(sharded / "checkpoints/step-00000000")


def test_no_configuration(source):
    (source / "config.json").write_text("{")
    refused(source, "config.json cannot be read")
    (source / "config.json").write_text("[]")
    refused(source, "config.json is not a JSON object")
    (source / "config.json").unlink()
    refused(source, "config.json is missing", "download the whole repository")


def test_python_files_are_neither_run_nor_copied(source, tmp_path):
    marker = tmp_path / "ran"
    for name in ("modeling_lladamoe.py", "configuration_lladamoe.py", "tokenization_x.py", "__init__.py", "setup.py"):
        (source / name).write_text(f"open({str(marker)!r}, 'w')\n")
    to_sharded(source, tmp_path / "out")
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    assert not marker.exists()
    for made in ("out", "exported"):
        assert not [name for name, content in files_of(tmp_path / made).items() if str(marker).encode() in content]


# --- tensors --------------------------------------------------------------------------------------------------


def test_an_extra_and_a_missing_tensor(source):
    def change(tensors):
        tensors["model.layers.9.input_layernorm.weight"] = torch.zeros(64)
        del tensors[QUERY]

    message = refused(rewritten(source, change), str(source), "LLaDA-MoE", "config.json describes")
    assert (
        f"1 tensor is missing: {QUERY}; 1 tensor is not of this model: model.layers.9.input_layernorm.weight" in message
    )


def test_a_wrong_shape(source):
    def change(tensors):
        tensors[GATE] = torch.zeros(8, 32, dtype=torch.bfloat16)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:200]

    message = refused(rewritten(source, change), "2 tensors are of a wrong shape")
    assert f"{GATE} (expected [8, 64], found [8, 32])" in message
    assert "lm_head.weight (expected [256, 64], found [200, 64])" in message


def test_many_faults_are_counted(source):
    def change(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            del tensors[name]

    assert re.search(r"96 tensors are missing: (\S+, ){4}\S+ and 91 more", refused(rewritten(source, change)))


def test_float16_is_converted_on_request_only(source, tmp_path):
    def change(tensors):
        tensors |= {name: value.half() for name, value in tensors.items()}

    rewritten(source, change)
    refused(source, "is torch.float16", "--dtype bf16 or fp32")
    to_sharded(source, tmp_path / "out", dtype=torch.float32)
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    expected = {name: value.half().float() for name, value in tensors_of("tiny-moe-softmax").items()}
    assert differing(read(tmp_path / "exported"), expected) == []


def test_quantised_weights(source):
    def change(tensors):
        tensors[QUERY] = torch.zeros(64, 64, dtype=torch.int8)

    refused(rewritten(source, change), f"{QUERY} is torch.int8", "quantised weights are not read")
    refused(source, "torch.int8", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [QUERY, "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_parts_of_one_weight_with_different_dtypes(source, tmp_path, name):
    def change(tensors):
        tensors[name] = tensors[name].float()

    rewritten(source, change)
    refused(source, f"{name} is torch.float32" if "up" in name else f"{name} is torch.float32 and", "give --dtype")
    assert not source.with_name(".target.converting").exists()
    to_sharded(source, tmp_path / "out", dtype=torch.bfloat16)
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    assert differing(read(tmp_path / "exported"), tensors_of("tiny-moe-softmax")) == []


def test_a_padded_vocabulary_is_stripped_and_said(source, tmp_path):
    def change(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat([tensors[name], torch.ones(8, 64, dtype=torch.bfloat16)])

    notes = to_sharded(rewritten(source, change), tmp_path / "out")["notes"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert f"{name}: 8 rows below the vocabulary of 256 are padding" in notes
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    assert differing(read(tmp_path / "exported"), tensors_of("tiny-moe-softmax")) == []


def test_more_rows_than_padding_are_another_vocabulary(tmp_path):
    config = config_of("tiny-dense")
    source = write(tmp_path / "source", tensors_of("tiny-dense"), config | {"vocab_size": 10})
    shape = "(expected [10, 64], found [256, 64])"
    refused(source, "2 tensors are of a wrong shape", f"{EMBEDDING} {shape}, {OUTPUT} {shape}")
    assert is_padding((126000, 8), (126464, 8)) and is_padding((150000, 8), (158191, 8))
    assert not is_padding((150000, 8), (158192, 8)) and not is_padding((256, 8), (264, 9))
    assert not is_padding((256, 8), (256, 8)) and not is_padding((256, 8), (255, 8))


def test_a_padded_vocabulary_of_a_sharded_checkpoint_is_stripped_and_said(source, tmp_path, monkeypatch):
    """As others' Megatron writes them: here the model of the manifest gets a smaller vocabulary than the weights."""
    from llada_megatron.parallel.checkpoint import manifest as manifests

    to_sharded(source, tmp_path / "out")
    step = tmp_path / "out/checkpoints/step-00000000"
    manifest = manifests.read(step)
    for model in (manifest.facts["model"], manifest.facts["run"]["model"]):
        model["vocab_size"] = 250
    manifests.write(step, manifest)
    notes = to_huggingface(tmp_path / "out", tmp_path / "exported")["notes"]
    assert "embedding.word_embeddings.weight: 6 rows below the vocabulary of 250 are padding" in notes
    expected = tensors_of("tiny-moe-softmax")
    found = read(tmp_path / "exported")
    assert json.loads((tmp_path / "exported/config.json").read_text())["vocab_size"] == 250
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name], expected[name][:250])


TIED = load_model("tiny-dense", ["tie_embeddings=true"])
EMBEDDING, OUTPUT = "model.transformer.wte.weight", "model.transformer.ff_out.weight"


def test_a_stored_copy_of_tied_embeddings_is_left_out_and_said(tmp_path):
    tensors = tensors_of(TIED)
    assert OUTPUT not in tensors
    source = write(tmp_path / "source", tensors | {OUTPUT: tensors[EMBEDDING]}, config_of(TIED))
    summary = to_sharded(source, tmp_path / "out", "tensor_parallel=2,pipeline_parallel=2")
    assert f"{OUTPUT} is {EMBEDDING} again (the configuration ties them)" in summary["notes"]
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    assert differing(read(tmp_path / "exported"), tensors) == []


@pytest.mark.parametrize(
    "change",
    [lambda copy: copy.index_fill(0, torch.tensor(255), 0), lambda copy: copy[:255], lambda copy: copy.float()],
    ids=["a row", "too short", "dtype"],
)
def test_another_output_layer_beside_tied_embeddings(tmp_path, change):
    tensors = tensors_of(TIED)
    source = write(tmp_path / "source", tensors | {OUTPUT: change(tensors[EMBEDDING])}, config_of(TIED))
    refused(source, "not of this model", f"{OUTPUT} (it differs from {EMBEDDING}, and the configuration ties them)")


# --- configuration --------------------------------------------------------------------------------------------


def test_an_unknown_kind_of_model_lists_the_known(source):
    message = refused(changed(source, model_type="gpt2"), "unknown model_type 'gpt2'")
    for kind in (
        "llada (dense LLaDA",
        "llada (LLaDA-MoE",
        "llada2_moe (",
        "bailing_moe_v2",
        "llama",
        "qwen3 (",
        "qwen3_moe",
    ):
        assert kind in message, message
    refused(changed(source, model_type=None), "unknown model_type None")
    ways = ("dense LLaDA (LLaDA-8B, LLaDA-1.5) has the key 'd_model'", "has the key 'num_experts'")
    refused(changed(source, num_experts=None), "'llada' stands for several formats", *ways)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_bias", True, "use_bias = True is not supported (only False is, in llada2)"),
        ("rope_scaling", {"rope_type": "yarn"}, "rope_scaling = {'rope_type': 'yarn'} is not supported"),
        ("expert_capacity", -1, "config.json: "),
        ("num_hidden_layers", "four", "num_hidden_layers = 'four' is not a whole number"),
        ("hidden_size", None, "'hidden_size' is missing; it is not a complete configuration"),
    ],
)
def test_a_configuration_that_asks_for_something_else(tmp_path, key, value, message):
    source = write(tmp_path / "source", tensors_of("tiny-moe"), config_of("tiny-moe") | {key: value})
    refused(source, str(source / "config.json"), message)


def test_a_parent_without_a_mask_token(tmp_path):
    from llada_megatron.llada_moe.huggingface.formats import llama

    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    config |= {"num_attention_heads": 1, "max_position_embeddings": 8, "eos_token_id": 1}
    source = write(tmp_path / "source", {"model.norm.weight": torch.ones(8)}, config)
    refused(source, llama.LLAMA.title, "names no mask token: give --mask-token-id N")
    refused(source, "missing", mask_token_id=7)


def llama(tmp_path, **keys):
    """What a LLaMA's first tensor and configuration are."""
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 64}
    config |= {"num_attention_heads": 1, "max_position_embeddings": 8, "eos_token_id": 1}
    return write(tmp_path / "source", {"model.norm.weight": torch.ones(8)}, config | keys)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (64, "64 is outside the vocabulary of 64 (0 to 63)"),
        (-1, "-1 is outside the vocabulary"),
        (1, "1 is also eos_token_id"),
    ],
)
def test_a_mask_token_that_none_can_be(tmp_path, mask, message):
    for ends in (1, [1, 2]):
        text = refused(llama(tmp_path, eos_token_id=ends), message, error=ConfigError, mask_token_id=mask)
        assert text.startswith(f"--mask-token-id {mask}: ") and "config.json" not in text


def test_a_mask_token_takes_the_place_of_a_wrong_one(tmp_path):
    refused(llama(tmp_path, mask_token_id=1000), "config.json", "1000 is outside the vocabulary")
    refused(llama(tmp_path, mask_token_id=1000), "missing", mask_token_id=7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_hidden_layers": 10**7}, "describes 10,000,000 layers, and there are 1 tensors"),
        ({"num_experts": 10**7}, "describes 4 layers of 10,000,000 experts, and there are"),
        ({"vocab_size": 10**12}, "parameters, and there are"),
        ({"expert_intermediate_size": 10**15}, "parameters, and there are"),
    ],
)
def test_sizes_beyond_all_measure_are_refused_at_once(source, tmp_path, keys, message):
    if "num_hidden_layers" in keys:
        source = llama(tmp_path / "parent", mask_token_id=7, **keys)
    else:
        changed(source, **keys)
    begin = time.monotonic()
    refused(source, "config.json", message, "it is of another model")
    assert time.monotonic() - begin < 2
    with pytest.raises(CheckpointError, match="it is of another model"):
        open_source(source)


def test_quantised_weights_are_refused_before_their_tensors(source):
    changed(source, quantization_config={"quant_method": "gptq", "bits": 4})
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(source, "quantization_config (quant_method 'gptq'): quantised weights are not read")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tensor_parallel=3", "tensor_parallel: 3 does not divide num_attention_heads 4; use one of 1, 2, 4"),
        ("pipeline_parallel=3", "pipeline_parallel: 3 does not divide num_layers 4"),
        ("expert_parallel=3", "expert_parallel: 3 does not divide num_experts 8; use one of 1, 2, 4, 8"),
        ("pipeline_parallel=2,pipeline_chunks_per_rank=3", "pipeline_parallel 2 x 3 chunks = 6 does not divide"),
    ],
)
def test_a_layout_that_does_not_fit(source, layout, message):
    refused(source, "--layout: ", message, error=ConfigError, layout=layout)


@pytest.mark.parametrize(
    "layout", ["data_parallel=2", "tensor=2", "tensor_parallel", "tensor_parallel=0", "expert_parallel=x,"]
)
def test_a_layout_that_is_none(source, layout):
    refused(source, f"--layout {layout.rstrip(',')}: it takes tensor_parallel=N", error=ConfigError, layout=layout)


@pytest.mark.parametrize("text", ["", "5", "0GB", "-1GB", "nan GB", "inf", "GB", "5 XB", "1e400GB"])
def test_sizes(text):
    if text == "5":
        assert parse_size(text) == 5
        assert [parse_size(word) for word in ("5GB", "1.5 kb", "2GiB", "64mib")] == [5 * 10**9, 1500, 2**31, 2**26]
        return
    with pytest.raises(ConfigError, match="a size such as 5GB, 500MB or 2GiB"):
        parse_size(text)


# --- targets --------------------------------------------------------------------------------------------------


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
        for action, origin in (("import", source), ("export", imported)):
            assert cli.main(["convert", action, str(origin), str(tmp_path / "out")]) == 1
            message = capsys.readouterr().err.splitlines()[-1]
            assert message.startswith("error: ") and "File too large" in message and "defect" not in message
            assert "__0_0.distcp" in message or "model.safetensors" in message
            shutil.rmtree(tmp_path / ".out.converting")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- sharded checkpoints --------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_not_exported(sharded):
    path = sharded / "checkpoints/step-00000000/__1_0.distcp"
    content = bytearray(path.read_bytes())
    expert = tensors_of("tiny-moe-softmax")["model.layers.3.mlp.experts.7.down_proj.weight"]
    content[content.index(bits(expert)[2]) + 100] ^= 1
    path.write_bytes(content)
    refused(sharded, "__1_0.distcp does not hold the bytes that were written", convert=to_huggingface)
    path.write_bytes(content[:-1])
    refused(sharded, "__1_0.distcp has", "bytes instead of", convert=to_huggingface)
    path.unlink()
    refused(sharded, "__1_0.distcp is missing", convert=to_huggingface)


def test_a_checkpoint_of_another_model_than_it_says(sharded):
    from llada_megatron.parallel.checkpoint import manifest as manifests

    step = sharded / "checkpoints/step-00000000"
    manifest = manifests.read(step)
    manifest.facts["model"]["num_layers"] = 5
    manifests.write(step, manifest)
    refused(sharded, "9 tensors are missing: decoder.layers.4.", "its manifest describes", convert=to_huggingface)


def test_a_family_without_a_published_format(sharded):
    from llada_megatron.parallel.checkpoint import manifest as manifests

    step = sharded / "checkpoints/step-00000000"
    manifest = manifests.read(step)
    manifest.facts["model"]["family"] = "qwen3"
    manifests.write(step, manifest)
    refused(sharded, "family qwen3 cannot be exported: no diffusion model is published", convert=to_huggingface)


def test_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no checkpoint in", "step-… directories", convert=to_huggingface)
    refused(tmp_path / "empty", "config.json is missing")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        open_source(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is not a directory: give a checkpoint's"):
        open_source(tmp_path / "absent")


# --- the command line -----------------------------------------------------------------------------------------


def test_exit_codes(source, tmp_path, capsys):
    for words, code in (
        (["import", str(source), str(tmp_path / "out"), "--layout", "tensor_parallel=3"], 2),
        (["import", str(source), str(tmp_path / "out"), "--workers", "0"], 2),
        (["export", str(source), str(tmp_path / "out"), "--shard-size", "many"], 2),
        (["verify", str(source), str(source), "--tolerance", "-1"], 2),
        (["import", str(tmp_path / "absent"), str(tmp_path / "out")], 1),
        (["export", str(source), str(tmp_path / "out")], 1),
    ):
        assert cli.main(["convert", *words, "--json"]) == code, words
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
        assert json.loads(captured.out)["exit_code"] == code
    assert not (tmp_path / "out").exists()


def test_what_a_conversion_says(source, tmp_path, capsys):
    assert cli.main(["convert", "import", str(source), str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "note: no tokenizer files in it" in captured.err
    line, report = captured.out.splitlines()
    assert (
        line
        == f"{tmp_path}/out/checkpoints/step-00000000: llada_moe, {len(tensors_of('tiny-moe-softmax'))} tensors, "
        + (f"{sum(value.numel() for value in tensors_of('tiny-moe-softmax').values()):,} parameters, 563 KB")
    )
    assert json.loads(report)["bytes"] == sum(value.nbytes for value in tensors_of("tiny-moe-softmax").values())
