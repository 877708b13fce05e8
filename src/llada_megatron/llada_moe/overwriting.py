"""No command writes over a file that it reads, nor into a checkpoint, which counts only as it was saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from llada_megatron.llada_moe.errors import ConfigError

_CHECKPOINT_FILES = ("manifest.json", "metadata.json")
"""A directory that holds both is a checkpoint."""


def refuse_overwriting(option: str, outputs: Iterable[str | Path], inputs: Iterable[str | Path | None]) -> None:
    """Refuse outputs that are inputs, also by another name (a link, another way to the same folder).

    Args:
        option: what names the outputs on the command line.
        outputs: every file that may be written, replaced or removed; none may lie in a checkpoint either.
        inputs: files that are read, and folders of which the files are, without those of their folders; None, and what
            is not there, does not count.

    Raises:
        ConfigError: with the input that would be lost.
    """
    outputs = [Path(output) for output in outputs]
    standing = {identity: output for output in outputs if (identity := _identity(output))}
    for path in _files(inputs) if standing else ():
        output = standing.get(_identity(path))
        if output is not None:
            what = "" if output == path else f"is the same file as {path}, which "
            raise ConfigError(f"{option}: {output} {what or 'is a file that '}this command reads; name another place")
    for output in outputs:
        refuse_inside_checkpoint(option, output)


def refuse_inside_checkpoint(option: str, output: str | Path) -> None:
    """Refuse an output in a step-… directory: with one more file it would not count as a checkpoint any longer.

    Raises:
        ConfigError: with the directory.
    """
    for folder in Path(output).resolve().parents:
        if all((folder / name).is_file() for name in _CHECKPOINT_FILES):
            raise ConfigError(
                f"{option}: {output} lies in the checkpoint {folder}, which would count as damaged with another file "
                "in it; name another place"
            )


def _files(inputs: Iterable[str | Path | None]) -> Iterator[Path]:
    for path in (Path(each) for each in inputs if each is not None):
        if path.is_dir():
            yield from path.iterdir()
        else:
            yield path


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from every other one; None if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
