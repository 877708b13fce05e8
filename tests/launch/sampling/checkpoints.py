"""Small random models with a tokenizer of bytes, imported as a user would, and the command line in this process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llada_megatron.cli import main
from llada_megatron.llada_moe.config import load_model
from tests.tools.convert.checkpoints import config_of, tensors_of, to_sharded, write

ROLES = ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIAL = ["<unk>", "<s>", "<|endoftext|>", "<|mask|>", *ROLES]
VOCABULARY = 272
"""A few more ids than the tokenizer has tokens."""


def tokenizer_in(folder: Path, template: str | None = None) -> None:
    """Write a tokenizer with a token per byte; its end of text is 2 and its mask 3, as in the tiny models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "mask_token": "<|mask|>", "bos_token": "<|startoftext|>"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def checkpoint(folder: Path, model: str = "tiny-dense", template: str | None = None, tokenizer: bool = True) -> Path:
    """An import of random weights: `tiny-moe` is block-causal, the others see everything."""
    config = dataclasses.replace(load_model(model), vocab_size=VOCABULARY)
    source = write(folder / f"{model}-source", tensors_of(config, "fp32"), config_of(config))
    if tokenizer:
        tokenizer_in(source, template)
    to_sharded(source, folder / model)
    return folder / model


def run_cli(capsys, *arguments: object) -> tuple[int, str, str]:
    """`llada ARGUMENTS` in this process: exit code, standard output, standard error."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def start_cli(*arguments: object, **options) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "llada_megatron.cli", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **streams | options)
