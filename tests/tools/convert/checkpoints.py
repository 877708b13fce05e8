"""Small Hugging Face checkpoints, written and read with the `safetensors` package, and both conversions in one line."""

from __future__ import annotations

import functools
import json
import math

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.huggingface.formats import export_format
from llada_megatron.llada_moe.huggingface.formats.table import write_config
from llada_megatron.llada_moe.huggingface.mapping import tensor_shapes
from llada_megatron.tools.convert import parse_layout
from llada_megatron.tools.convert.exporter import ExportOptions, export_checkpoint
from llada_megatron.tools.convert.importer import ImportOptions, import_checkpoint

INDEX = "model.safetensors.index.json"
MODELS = ("tiny-dense", "tiny-moe-softmax", "tiny-moe")
WORDS = "It was the best of times , worst age wisdom foolishness"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@functools.cache
def config_of(model):
    """The `config.json` of a model of `configs/models`, or of a ModelConfig."""
    model = load_model(model) if isinstance(model, str) else model
    return write_config(export_format(model), model)


@functools.cache
def tensors_of(model, dtype="bf16", seed=0):
    """Its weights under their published names; the expert bias is in float32."""
    model = load_model(model) if isinstance(model, str) else model
    shapes = tensor_shapes(export_format(model), model)
    drawn = torch.randn(sum(map(math.prod, shapes.values())), generator=torch.Generator().manual_seed(seed)) * 0.2
    parts = drawn.split([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.view(shape).to(torch.float32 if name.endswith("expert_bias") else DTYPES[dtype])
        for part, (name, shape) in zip(parts, shapes.items(), strict=True)
    }


def write(directory, tensors, config, files=1):
    """A checkpoint with the tensors dealt out to so many files; more than one have an index."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    places = {tensor: names[number % files] for number, tensor in enumerate(tensors)}
    for file in names:
        held = {name: value.clone() for name, value in tensors.items() if places[name] == file}
        save_file(held, directory / ("model.safetensors" if files == 1 else file), {"format": "pt"})
    if files > 1:
        total = sum(value.nbytes for value in tensors.values())
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def written(directory, model, dtype="bf16", files=1):
    """`write` for a model by name."""
    return write(directory, tensors_of(model, dtype), config_of(model), files)


def read(directory):
    """Every tensor of a checkpoint, by the index if there is one."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as stream:
            assert not found.keys() & stream.keys()
            found |= {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    if (directory / INDEX).exists():
        index = json.loads((directory / INDEX).read_text())
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
        for file in set(index["weight_map"].values()):
            with safe_open(directory / file, "pt") as stream:
                assert {name for name, place in index["weight_map"].items() if place == file} == set(stream.keys())
    return found


def differing(found, expected):
    """Names of tensors that are not the same: there, dtype, shape, bits."""
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found or name not in expected or bits(found[name]) != bits(expected[name])
    ]


def bits(tensor):
    """What must be equal for two tensors to be the same one."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def with_tokenizer(directory, words=WORDS):
    """The directory, with a tokenizer whose end of text is 2 and whose mask is 3, as in the tiny models."""
    vocabulary = {
        word: number for number, word in enumerate(["<unk>", "x", "<|endoftext|>", "<|mask|>", *words.split()])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def to_sharded(source, target, layout=None, **options):
    """`llada convert import`."""
    return import_checkpoint(source, target, ImportOptions(layout=parse_layout(layout), **options))


def to_huggingface(source, target, **options):
    """`llada convert export`, with --without-tokenizer where the checkpoint has none."""
    try:
        return export_checkpoint(source, target, ExportOptions(**options))
    except DataError as error:
        if "export the weights alone with --without-tokenizer" not in str(error):
            raise
    return export_checkpoint(source, target, ExportOptions(without_tokenizer=True, **options))


def files_of(directory):
    """Every file's bytes, by its path in the directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
