"""Small corpora for tests, and the tiny models that fit them."""

import argparse
import contextlib
import dataclasses
import json
import random

from llada_megatron.cli import main
from llada_megatron.llada_moe.config import load_model
from llada_megatron.tools import prepare

PREPARE_OPTIONS = ["--output", "corpus", "--train-tokenizer", "--vocab-size", "400"]
"""What `llada prepare` makes of `write_texts`: `corpus` beside them."""


def prepare_texts(folder, names):
    """Prepares text files in `folder` as `corpus` beside them, in this process."""
    with contextlib.chdir(folder):
        assert main(["prepare", *names, *PREPARE_OPTIONS]) == 0


def prepared_set(root):
    """Prepares a set at `root/set` in this process; returns its manifest and tokenizer."""
    words = random.Random(0)
    texts = ["".join(words.choices("abcdefgh ", k=words.randint(40, 200))) for _ in range(60)]
    (root / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = argparse.ArgumentParser()
    prepare.add_arguments(arguments)
    command = [str(root / "corpus.jsonl"), "--output", str(root / "set"), "--train-tokenizer", "--vocab-size", "280"]
    return prepare.prepare(arguments.parse_args([*command, "--workers", "1"]), root / "set")


def model_for(tokenizer, name="tiny-moe"):
    """A shipped model with the vocabulary of `tokenizer`."""
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id}
    return dataclasses.replace(load_model(name), vocab_size=tokenizer.vocab_size, **ids)


def write_texts(folder, count=10):
    """Writes text files of words of all printable letters into `folder`; returns their names."""
    words = random.Random(0)
    for name in range(count):
        letters = "".join(chr(33 + words.randrange(90)) for _ in range(600))
        (folder / f"{name}.txt").write_text(" ".join(letters[i : i + 5] for i in range(0, 600, 5)))
    return [f"{name}.txt" for name in range(count)]
