"""`llada eval infill`: spans taken out of held-out text, filled in, and compared with what stood there."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import emit_json
from llada_megatron.launch.evaluation.protocol_options import add_protocol, protocol_of
from llada_megatron.launch.evaluation.spread_job import SpreadJob, run_spread
from llada_megatron.launch.sampling.options import add_method, add_model, require_checkpoint, settings_of
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.overwriting import refuse_overwriting
from llada_megatron.parallel.sampling.settings import Settings

if TYPE_CHECKING:
    from llada_megatron.llada_moe.evaluation.infill_spans import InfillSpan
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.parallel.evaluation.served_model import ServedModel

_LENGTHS = "1,2,4,8,16,32"
_MOST_FUNCTIONS = 20_000
"""Functions of held-out files that are looked at; of many, evenly spaced ones are taken."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada eval infill`."""
    add_model(parser)
    what = parser.add_argument_group("what is filled in")
    what.add_argument("--texts", metavar="FILE", help='lines {"text": …} (default: the held-out split of the run)')
    what.add_argument("--windows", type=int, default=256, metavar="N", help="texts that are read (256)")
    what.add_argument("--lengths", default=_LENGTHS, metavar="A,B", help=f"tokens of a span ({_LENGTHS})")
    what.add_argument("--spans", type=int, default=64, metavar="N", help="spans of each length (64)")
    what.add_argument(
        "--python",
        action="store_true",
        help="also ask whether the text still parses as Python; without --texts, of the functions in held-out files",
    )
    what.add_argument("--find-length", action="store_true", help="also let the model choose the length of each span")
    against = parser.add_argument_group("what it is compared with")
    against.add_argument("--autoregressive", metavar="CHECKPOINT", help="an autoregressive model, same tokenizer")
    against.add_argument(
        "--candidates", type=int, default=8, metavar="N", help="its drafts that the right side ranks (8)"
    )
    add_protocol(parser, samples=32, chains=False)
    add_method(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="all figures and the protocol, as JSON")
    output.add_argument("--local", action="store_true", help="start the ranks here, even in a job of torchrun or srun")
    parser.set_defaults(max_new_tokens=None)  # nothing is continued: a span has its own length


@dataclass(frozen=True)
class InfillWork:
    """The work of each rank."""

    settings: Settings
    protocol: LikelihoodProtocol
    texts: Sequence[str] | None
    file: str | None
    """Where the texts are from."""
    windows: int
    lengths: Sequence[int]
    spans: int
    python: bool
    find_length: bool
    autoregressive: str | None
    candidates: int

    def __call__(self, loaded: LoadedModel) -> dict[str, Any]:
        """Figures of every length, of this model and of the baselines; every rank does the same."""
        from llada_megatron.llada_moe.evaluation.infill_spans import choose_infill_spans
        from llada_megatron.parallel.evaluation.infill_run import RIGHT_SIDE, span_costs
        from llada_megatron.parallel.evaluation.served_model import ServedModel

        served = ServedModel(loaded, self.protocol, self.settings, driven=False)
        longest = loaded.run.model.max_sequence_length
        if self.find_length and max(self.lengths) >= longest:
            raise ConfigError(f"--lengths: a gap of {max(self.lengths)} tokens; the model takes {longest} in all")
        texts = self._windows(loaded, served)
        spans = choose_infill_spans(texts, self.lengths, self.spans, self.settings.seed)
        if not spans:
            raise DataError(f"no text has {3 * min(self.lengths)} tokens, three times a span of the shortest length")
        costs = span_costs(loaded, spans, self.protocol)
        rows = self._rows("this model", served, spans, costs, self._written(served, spans))
        rows += self._unigram(spans, texts, served)
        rows += self._baseline(served, spans)
        unread = ("layout", "checkpoint", "max_new_tokens", "batch_size", "cuda_graphs")
        return {
            "kind": "infill",
            "protocol": {
                **served.protocol.record(),
                "block": served.kind.block,
                "sampling": {k: v for k, v in asdict(self.settings).items() if k not in unread},
                "texts": len(texts),
                "source": self._source(),
                "length": "given, and found where it is said" if self.find_length else "given",
                "right_side": RIGHT_SIDE,
                "checkpoint": str(loaded.path.resolve()),
                "precision": str(loaded.model.config.params_dtype).removeprefix("torch."),
                "autoregressive": self.autoregressive,
                "candidates": self.candidates if self.autoregressive else None,
            },
            "rows": rows,
        }

    def _source(self) -> str:
        if self.texts is not None:
            return self.file or "texts"
        return "functions of the held-out files" if self.python else "windows of the held-out split"

    def _windows(self, loaded: LoadedModel, served: ServedModel) -> list[tuple[int, ...]]:
        longest = loaded.run.model.max_sequence_length
        if self.texts is not None:
            return [tuple(served.tokenizer.encode(text)[:longest]) for text in self.texts[: self.windows]]
        from llada_megatron.llada_moe.data.training_data import TrainingData
        from llada_megatron.llada_moe.objectives import make_objective

        objective = make_objective(loaded.run.objective, loaded.run.training)
        if not loaded.run.data.sets or objective.samples(loaded.run, "validation") is not None:
            raise ConfigError(f"{loaded.path}: its run has no prepared texts with a held-out part; give --texts FILE")
        held_out = TrainingData(loaded.run, "validation", objective)
        if not self.python:  # each window once: a split may have fewer than are asked for
            numbers = [n for n in range(self.windows) if held_out.locate(n).epoch == 0]
            length = loaded.run.training.sequence_length  # of `[x_t ; x_0]` the text, once
            return [tuple(held_out.batch([n]).labels[0, :length].tolist()) for n in numbers]
        from llada_megatron.llada_moe.evaluation.python_functions import functions_of

        documents = (document for each in held_out.sets for document, _ in each.each_document())
        code = (served.tokenizer.decode(document[:-1].tolist()) for document in documents)
        longest = min(longest, loaded.run.training.sequence_length)  # of what it was trained on
        found: list[tuple[int, ...]] = []
        for function in itertools.chain.from_iterable(map(functions_of, code)):
            tokens = tuple(served.tokenizer.encode(function))
            if 3 * min(self.lengths) <= len(tokens) <= longest:
                found.append(tokens)
            if len(found) == _MOST_FUNCTIONS:
                break
        return (
            [found[n * len(found) // self.windows] for n in range(self.windows)] if len(found) > self.windows else found
        )

    def _written(self, served: ServedModel, spans: Sequence[InfillSpan]) -> dict[str, list[tuple[int, ...]]]:
        from llada_megatron.parallel.evaluation.infill_run import fill, length_found

        found = {"": fill(served, spans)}
        if self.find_length:
            found["length found"] = [new for _, new in length_found(served, spans, self.lengths, self.protocol)]
        return found

    def _rows(
        self,
        name: str,
        served: ServedModel,
        spans: Sequence[InfillSpan],
        costs: Sequence[Any],
        written: dict[str, list[tuple[int, ...]]],
    ) -> list[dict[str, Any]]:
        """Figures of every length; the cost is that of what stood there, and so the same for all that was written."""
        from llada_megatron.llada_moe.evaluation.infill_spans import Filled, infill_figures
        from llada_megatron.llada_moe.evaluation.mean_error import mean_with_error

        rows = []
        for note, each in written.items():
            for length in self.lengths:
                numbers = [i for i, span in enumerate(spans) if len(span.truth) == length]
                if not numbers:
                    continue
                filled = [Filled(spans[i], each[i], self._parses(served, spans[i], each[i])) for i in numbers]
                bits = [-costs[i].nats / (length * math.log(2)) for i in numbers] if costs else None
                row = {
                    "writer": name + (f", {note}" if note else ""),
                    "length": length,
                    "bits_per_token": None if bits is None else mean_with_error(bits),
                    **infill_figures(filled),
                }
                rows.append(row if note else row | {"length_right": None})
        return rows

    def _parses(self, served: ServedModel, span: InfillSpan, written: tuple[int, ...]) -> bool | None:
        if not self.python:
            return None
        from llada_megatron.llada_moe.evaluation.python_functions import parsed

        decode = served.tokenizer.decode
        if parsed(decode(list(span.text))) is None:
            return None
        return parsed(decode([*span.before, *written, *span.after])) is not None

    def _unigram(
        self, spans: Sequence[InfillSpan], texts: Sequence[tuple[int, ...]], served: ServedModel
    ) -> list[dict[str, Any]]:
        """The commonest token of these texts everywhere, and what spans cost under their frequencies."""
        from collections import Counter

        from llada_megatron.llada_moe.evaluation.estimators import Estimate

        counts = Counter(token for text in texts for token in text)
        total, vocab = sum(counts.values()), served.model.vocab_size
        costs = [
            Estimate(sum(math.log((counts[t] + 1) / (total + vocab)) for t in span.truth), 0.0, len(span.truth), 0)
            for span in spans
        ]
        common = counts.most_common(1)[0][0]
        return self._rows("unigram", served, spans, costs, {"": [(common,) * len(span.truth) for span in spans]})

    def _baseline(self, served: ServedModel, spans: Sequence[InfillSpan]) -> list[dict[str, Any]]:
        if self.autoregressive is None:
            return []
        from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
        from llada_megatron.parallel.evaluation.infill_run import continue_left_to_right, reranked, span_costs
        from llada_megatron.parallel.evaluation.query_scorer import kind_of

        other = load_checkpoint(self.autoregressive, self.settings.layout)
        if kind_of(other).fills_masks:
            raise ConfigError(f"--autoregressive {self.autoregressive}: a diffusion model")
        if other.run.model.vocab_size != served.model.vocab_size:
            raise ConfigError(f"--autoregressive {self.autoregressive}: another vocabulary than the model's")
        digests = {(each.metadata.get("tokenizer") or {}).get("sha256") for each in (served.loaded, other)}
        if len(digests - {None}) > 1:
            raise ConfigError(f"--autoregressive {self.autoregressive}: another tokenizer than the model's")
        costs = span_costs(other, spans, LikelihoodProtocol("next-token"), sides=False)
        seed = self.settings.seed
        longest = max(self.lengths) if self.find_length else None
        left = continue_left_to_right(other, spans, 0.0, seed, length=longest)
        drafts = [continue_left_to_right(other, spans, 1.0, seed, draw, longest) for draw in range(self.candidates)]
        options = [list(each) for each in zip(left, *drafts, strict=True)]
        same = [[each[: len(span.truth)] for each in some] for some, span in zip(options, spans, strict=True)]
        ranked = {"": reranked(other, spans, same)}
        if self.find_length:
            cut = [[each[:length] for each in some for length in self.lengths] for some in options]
            ranked["length found"] = reranked(other, spans, cut)
        rows = self._rows("autoregressive, left side", served, spans, costs, {"": [each[0] for each in same]})
        return rows + self._rows("autoregressive, ranked by the right side", served, spans, [], ranked)


def run(args: argparse.Namespace) -> int:
    """Fill spans in; raises ConfigError, DataError or CheckpointError."""
    settings = settings_of(args)
    try:
        lengths = [int(text) for text in args.lengths.split(",")]
    except ValueError:
        lengths = [0]
    if min(lengths) < 1:
        raise ConfigError(f"--lengths {args.lengths}: whole numbers from 1, with commas")
    for name in ("windows", "spans", "candidates"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: at least 1")
    if args.autoregressive is not None:
        require_checkpoint(args.autoregressive)
    if args.output is not None:
        if Path(args.output).is_dir() or not Path(args.output).absolute().parent.is_dir():
            raise ConfigError(f"--output {args.output}: give a file in a folder that there is")
        refuse_overwriting("--output", [args.output], [args.texts, args.tokenizer])
    work = InfillWork(
        settings=settings,
        protocol=protocol_of(args),
        texts=None if args.texts is None else _texts(args.texts),
        file=args.texts,
        windows=args.windows,
        lengths=lengths,
        spans=args.spans,
        python=args.python,
        find_length=args.find_length,
        autoregressive=args.autoregressive,
        candidates=args.candidates,
    )
    result = run_spread(SpreadJob(args.checkpoint, settings.layout, work, settings.fp8), args.local)
    if result is not None:
        if args.output is not None:
            Path(args.output).write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", "utf-8")
        _show(result, work.protocol)
        if args.json:
            emit_json(result)
    return 0


def _texts(file: str) -> list[str]:
    from llada_megatron.llada_moe.evaluation.scored_lines import parse_scored_lines

    try:
        lines = parse_scored_lines(Path(file).read_text("utf-8-sig").split("\n"), file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    texts = [line.answers[0] for line in lines if line.whole]
    if len(texts) < len(lines) or not all(isinstance(text, str) for text in texts):
        raise DataError(f'{file}: every line is {{"text": …}}')
    return [str(text) for text in texts]


def _show(result: dict[str, Any], protocol: LikelihoodProtocol) -> None:
    keys = ("exact", "token_accuracy", "bits_per_token", "parses", "length_right")
    names = ("exact", "tokens", "bits/token", "parses", "length right")
    width = max(len(row["writer"]) for row in result["rows"])
    print(f"{'writer':<{width}} {'length':>6} {'spans':>5}" + "".join(f"{name:>16}" for name in names))
    for row in result["rows"]:
        figures = "".join(f"{_figure(row[key]):>16}" for key in keys)
        print(f"{row['writer']:<{width}} {row['length']:>6} {row['spans']:>5}{figures}")
    print(f"± one standard error over spans; {result['protocol']['texts']} texts: {result['protocol']['source']}")
    print(f"bits: of what stood there; {protocol}")
    print("the true length of a span is given, except where it says that the length was found")


def _figure(figure: dict[str, float | None] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['value']:.3f}" + ("" if figure["error"] is None else f" ± {figure['error']:.3f}")
