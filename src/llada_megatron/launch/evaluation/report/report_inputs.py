"""What is given to `llada eval report`: folders of runs, and files of results, whose kind their content says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada_megatron.launch.evaluation.report.reversal_results import is_reversal, read_reversal
from llada_megatron.launch.evaluation.report.run_curves import RunCurves, read_curves
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.parallel.training.metrics_file import EXPERTS_FILE_NAME, FILE_NAME

MOST_RUNS = 24
MALFORMED = (LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError)
"""What reading JSON of another form than expected ends with."""
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class ReportedRun:
    """A run's folder."""

    name: str
    path: Path
    config: dict[str, Any]
    """Its `config.yaml`; empty where there is none."""
    curves: RunCurves
    demo: dict[str, Any] | None
    """`report.json` of `make demo`."""


@dataclass(frozen=True)
class ReportedFile:
    """A file of results."""

    path: Path
    kind: str
    """A key of `KINDS`."""
    content: Any


@dataclass
class ReportInputs:
    """Everything that the page is made of."""

    runs: list[ReportedRun] = field(default_factory=list)
    files: list[ReportedFile] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[ReportedFile]:
        """The files of a kind."""
        return [file for file in self.files if file.kind == kind]

    def run_of(self, checkpoint: str | None) -> str:
        """The name of the run that a checkpoint belongs to; of another one the end of its path."""
        if checkpoint is None:
            return "(not said)"
        path = Path(checkpoint)
        for run in self.runs:
            if run.path.resolve() in (path, *path.parents):
                return run.name
        return "/".join(path.parts[-3:])


KINDS = {
    "likelihood": "llada eval likelihood FILE --output",
    "harness": "llada eval harness --output",
    "infill": "llada eval infill --output",
    "reversal": "llada eval reversal --output FOLDER, or --json",
    "samples": "llada sample --output, or --json",
    "samplers": "llada bench sample --output",
    "experts": "profile.json of llada experts --output",
}
"""Which command writes the files of a kind."""


def read_inputs(paths: Sequence[str]) -> ReportInputs:
    """Read everything; raises ConfigError for what is given twice, DataError for what is nothing of the kind."""
    found = ReportInputs()
    places = [Path(path) for path in paths]
    resolved = [place.resolve() for place in places]
    for place in places:
        if resolved.count(place.resolve()) > 1:
            raise ConfigError(f"{place} is given twice")
    folders = [place for place in places if place.is_dir() and not is_reversal(place)]
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs: at most {MOST_RUNS} in one report")
    names = _names(folders)
    for place in places:
        try:
            if place in names:
                found.runs.append(_run(place, names[place]))
            elif place.is_dir():
                found.files.append(ReportedFile(place, "reversal", read_reversal(place)))
            else:
                found.files.append(_file(place))
        except OSError as error:
            raise DataError(f"{place}: {error.strerror}") from error
        except MALFORMED as error:
            raise malformed(place, error) from error
    return found


def malformed(path: Path, error: Exception) -> DataError:
    """The one line about a file, or a run's folder, whose content has not the form that its command writes."""
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return DataError(f"{path}: not of the form that its command writes ({what}); write it again")


def _names(folders: Sequence[Path]) -> dict[Path, str]:
    """The last parts of each path, as many as tell all of them apart."""
    for count in range(1, 1 + max((len(folder.resolve().parts) for folder in folders), default=1)):
        names = {folder: "/".join(folder.resolve().parts[-count:]) for folder in folders}
        if len(set(names.values())) == len(folders):
            return names
    return {folder: str(folder) for folder in folders}


def _run(folder: Path, name: str) -> ReportedRun:
    if not any((folder / each).exists() for each in (FILE_NAME, "config.yaml", _CHECKPOINTS)):
        raise DataError(f"{folder}: not a run's folder (no {FILE_NAME}, no config.yaml); give its output_dir")
    demo = folder / "report.json"
    return ReportedRun(
        name, folder, _config(folder / "config.yaml"), read_curves(folder), _json(demo) if demo.exists() else None
    )


def _config(path: Path) -> dict[str, Any]:
    """As it stands, without the checks of a run that starts: an old run must still be readable."""
    import yaml

    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a run's configuration ({str(error).splitlines()[0]})") from error
    return content if isinstance(content, dict) else {}


def _file(path: Path) -> ReportedFile:
    if path.name in (FILE_NAME, EXPERTS_FILE_NAME, "config.yaml"):
        raise DataError(f"{path}: belongs to a run; give its folder, {path.parent}")
    if path.suffix == ".jsonl":
        return _of_lines(path)
    content = _json(path)
    kind = _kind(content)
    if kind is None:
        told = "; ".join(f"{kind}: {command}" for kind, command in KINDS.items())
        raise DataError(f"{path}: no result that a report can show. It shows {told}")
    if kind == "harness":
        content = _harness_parts(content)
    _require(path, kind, content)
    return ReportedFile(path, kind, content["samples"] if kind == "samples" else content)


def _kind(content: Any) -> str | None:
    """What an object of JSON is a result of."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("kind"), str) and content["kind"] in KINDS:
        return content["kind"]
    rows = content.get("rows")
    if isinstance(content.get("parts"), list):
        return "harness"  # without rows, the parts of --published that were done when it was interrupted
    first = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    if isinstance(content.get("results"), dict) and isinstance(content.get("protocol"), dict):
        return "harness"
    if {"writer", "length", "exact"} <= first.keys():
        return "infill"
    if isinstance(content.get("claims"), list) and content.get("protocol", {}).get("benchmark") == "reversal":
        return "reversal"
    if {"experts", "layers", "top_k"} <= content.keys():
        return "experts"
    if isinstance(content.get("samples"), list):
        return "samples"
    return None


_NEEDED: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "likelihood": (None, ("number", "nats", "standard_error", "tokens", "bytes")),
    "harness": ("parts", ("protocol", "results")),
    "infill": ("rows", ("writer", "length", "spans")),
    "reversal": ("claims", ("claim", "value", "unit", "goal", "holds")),
    "samples": ("samples", ("number",)),
    "samplers": ("samplers", ("name", "aup", "points")),
    "experts": ("layers", ("tokens",)),
}
"""Of each kind what holds its entries, and what every entry must have."""


def _require(path: Path, kind: str, content: Any) -> None:
    """Refuse a file in which something is missing. Raises DataError."""
    holder, keys = _NEEDED[kind]
    entries = content if holder is None else content.get(holder)
    every = list(entries.values()) if isinstance(entries, dict) else entries
    if not isinstance(every, list):
        raise DataError(f"{path}: {kind} without {holder}; write it again with {KINDS[kind]}")
    for number, entry in enumerate(every, start=1):
        missing = [key for key in keys if key not in entry] if isinstance(entry, dict) else ["everything"]
        if missing:
            raise DataError(
                f"{path}: entry {number} of {kind} lacks {', '.join(missing)}; write it again with {KINDS[kind]}"
            )


def _harness_parts(content: dict[str, Any]) -> dict[str, Any]:
    """Results of lm_eval without the answers of every question, and published figures beside them, if there are any."""
    parts = content.get("parts", [content])
    for part in parts:
        if isinstance(part, dict):
            part.pop("samples", None)
    published = {key: content.get(key) for key in ("model", "source", "rows")} if "rows" in content else None
    return {"parts": parts, "published": published}


def _of_lines(path: Path) -> ReportedFile:
    """Results of likelihood, below their protocol, or samples."""
    with path.open("rb") as stream:
        lines = [_parsed(line, path, number) for number, line in enumerate(stream, start=1) if line.endswith(b"\n")]
    if lines and isinstance(lines[0].get("protocol"), dict):
        _require(path, "likelihood", lines[1:])
        return ReportedFile(path, "likelihood", lines)
    if lines and all(isinstance(line.get("number"), int) and "forwards" in line for line in lines):
        return ReportedFile(path, "samples", lines)
    raise DataError(f"{path}: neither likelihoods ({KINDS['likelihood']}) nor samples ({KINDS['samples']})")


def _parsed(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}, line {number}: not an object of JSON")
    return found


def _json(path: Path) -> Any:
    """The content of a file; of one that ends with a line of JSON (saved output of --json) that line."""
    text = path.read_text("utf-8", "replace")
    try:
        return json.loads(text)
    except ValueError as error:
        try:
            return json.loads((text.rstrip().splitlines() or [""])[-1])
        except ValueError:
            raise DataError(f"{path}: not JSON ({error})") from error
