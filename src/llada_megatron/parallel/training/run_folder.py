"""What a run keeps beside its checkpoints, so that the folder alone is enough: its configuration and its tokenizer.

A folder that goes away while the run is in it is noticed, and made anew from what is held in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config import dump_yaml, load_run
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.set_manifest import TokenizerFacts
from llada_megatron.llada_moe.errors import ConfigError, DataError, ResourceError
from llada_megatron.llada_moe.huggingface.tokenizer_export import FILES, MODEL, find_tokenizer_files
from llada_megatron.llada_moe.huggingface.tokenizer_names import FAST
from llada_megatron.parallel.checkpoint.manifest import write_durably
from llada_megatron.parallel.checkpoint.search import TOKENIZER, tokenizer_folder

CONFIG = "config.yaml"


class RunFolder:
    """The output directory of a run. The methods of rank 0 are called on rank 0 only."""

    def __init__(
        self, run: RunConfig, facts: TokenizerFacts, started_from: Path | None, template: str | None = None
    ) -> None:
        """Change nothing yet.

        Args:
            facts: of the tokenizer that the run's sets were prepared with.
            started_from: the step directory whose weights the run begins with, if any.
            template: the chat template of the conversations that are learnt, if any.
        """
        self._template = template
        self._run, self._facts, self._path = run, facts, Path(run.output_dir)
        self._places = [self._path / TOKENIZER, tokenizer_folder(started_from) if started_from else None]
        self._tokenizer: dict[str, bytes] = {}
        self._device = 0

    def open(self, report: Callable[[str], None]) -> None:
        """On rank 0: read the tokenizer, and write it and the configuration; also beside copies of the checkpoints.

        Raises:
            DataError: as `tokenizer_to_carry`.
            OSError: the folder cannot be written to.
        """
        self._tokenizer = tokenizer_to_carry(self._run, self._facts, self._places)
        if self._template is not None:
            self._tokenizer["chat_template.jinja"] = self._template.encode("utf-8")
        self.write()
        self._device = self._path.stat().st_dev
        try:
            if self._run.checkpoint.copy_to:
                self._write_tokenizer(Path(self._run.checkpoint.copy_to))
        except OSError as error:  # unavailable storage must not keep a run from starting
            report(f"the tokenizer could not be written to {self._run.checkpoint.copy_to} ({error.strerror})")

    def write(self) -> None:
        """On rank 0: write the configuration and the tokenizer.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        if not _holds(self._path / CONFIG, self._run):  # a file with the same values keeps its comments
            (self._path / CONFIG).write_text(dump_yaml(self._run), "utf-8")
        self._write_tokenizer(self._path)

    def missing(self, newest: Path | None) -> list[str]:
        """On rank 0: names in the folder that should be there and are not.

        Args:
            newest: the step directory that was saved last; None = there is none yet.
        """
        wanted = [CONFIG, *(f"{TOKENIZER}/{name}" for name in self._tokenizer)]
        gone = [name for name in wanted if not (self._path / name).is_file()]
        if newest is not None and not newest.is_dir():
            gone.append(f"{newest.parent.name}/{newest.name}")
        return gone

    def restore(self) -> None:
        """On rank 0: make the folder and its files anew.

        Raises:
            ResourceError: it was on another file system, which is not mounted any more, or it cannot be written to.
        """
        if _device(self._path) != self._device:
            raise ResourceError(
                f"{self._path} was on a file system that is no longer mounted there; the run ends, so that nothing is "
                "written to another one. Mount it and run the same command again to go on from the newest checkpoint"
            )
        try:
            self.write()
        except OSError as error:
            raise ResourceError(
                f"{self._path} went away while the run was writing to it, and cannot be made anew ({error.strerror})"
            ) from error

    def _write_tokenizer(self, place: Path) -> None:
        if not self._tokenizer:
            return
        folder = place / TOKENIZER
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if name not in self._tokenizer:  # of another tokenizer, with which an earlier run in this folder began
                (folder / name).unlink(missing_ok=True)
        for name, data in self._tokenizer.items():
            if not (folder / name).is_file() or (folder / name).read_bytes() != data:
                write_durably(folder / name, data)


def tokenizer_to_carry(run: RunConfig, facts: TokenizerFacts, places: Iterable[Path | None]) -> dict[str, bytes]:
    """The files of the tokenizer that the sets of a run were prepared with, by name.

    Args:
        places: folders that may hold the same tokenizer with more than a set keeps (the names of special tokens, a
            chat template); the first that does is taken.

    Raises:
        DataError: the set's tokenizer is missing, or not the one that it was prepared with.
    """
    for place in filter(None, places):
        try:
            files = {path.name: path.read_bytes() for path in find_tokenizer_files(place)}
        except (DataError, OSError):  # a link that leads elsewhere, or no right to read: the set's file does as well
            continue
        if _sha256(files.get(FAST, files.get(MODEL, b""))) == facts.sha256:
            return files
    source = Path(run.data.sets[0].path).parent / facts.file
    if not source.is_file():
        raise DataError(
            f"{source} is missing: the tokenizer belongs to the prepared set; put it back beside the tokens"
        )
    data = source.read_bytes()
    if _sha256(data) != facts.sha256:
        raise DataError(f"{source} is not the tokenizer that the set was prepared with; put that back, or prepare anew")
    return {f"tokenizer{facts.suffix}": data}


def tokenizer_facts(run: RunConfig, facts: TokenizerFacts) -> dict[str, Any]:
    """What a checkpoint's manifest says of its run's tokenizer."""
    path = Path(run.output_dir).absolute() / TOKENIZER / f"tokenizer{facts.suffix}"
    return {"sha256": facts.sha256, "vocab_size": facts.vocab_size, "path": str(path)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _holds(path: Path, run: RunConfig) -> bool:
    try:
        return load_run(path) == run
    except (ConfigError, OSError):
        return False


def _device(path: Path) -> int:
    """The file system of a path, or of the nearest folder above it that exists."""
    return os.stat(next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())).st_dev
