"""`llada eval`: what a trained model is worth, on one process or on the ranks of a layout."""

from __future__ import annotations

import argparse
from typing import Any

from llada_megatron.launch.evaluation import (
    harness_command,
    infill_command,
    likelihood_command,
    report_command,
    reversal_command,
)

EXAMPLES = """\
examples:
  llada eval likelihood runs/demo questions.jsonl                       accuracy, or the cost of texts, with errors
  llada eval likelihood runs/demo texts.jsonl --samples 32 --output scores.jsonl
  llada eval likelihood runs/demo texts.jsonl --estimator left-to-right
  llada eval likelihood runs/large questions.jsonl --guidance 0.5 layout.tensor_parallel=2
  llada eval harness runs/demo --tasks arc_challenge,piqa --output results.json
  llada eval harness runs/chat --tasks my_task --task-folder tasks/ --chat-template layout.data_parallel=4
  llada eval infill runs/demo --spans 32 --autoregressive runs/demo-autoregressive
  llada eval report runs/demo runs/other scores.jsonl results.json --output report.html
  llada eval reversal --output runs/reversal                            trains its own models on made-up facts

FILE holds one JSON object a line: {"context": …, "options": […], "answer": N} is a question whose right option is
number N from 0, {"context": …, "continuation": …} and {"text": …} are texts. See docs/evaluate.md."""


class _Intermixed(argparse.ArgumentParser):
    """Takes `layout.AXIS=N` also behind options, which argparse does not by itself below a subcommand."""

    _under_way = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As of any parser; the parent calls it."""
        if self._under_way:
            return super().parse_known_args(args, namespace)
        self._under_way = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._under_way = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be measured."""
    names = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Intermixed)
    likelihood_command.add_arguments(
        names.add_parser("likelihood", help="log-likelihood of texts and of the options of questions")
    )
    harness_command.add_arguments(
        names.add_parser("harness", help="tasks of lm-evaluation-harness (pip install 'llada-megatron[eval]')")
    )
    infill_command.add_arguments(names.add_parser("infill", help="spans of held-out text, filled in"))
    report_command.add_arguments(names.add_parser("report", help="one page for one run, or several side by side"))
    reversal_command.add_arguments(
        names.add_parser("reversal", help="trained on 'A is B', asked 'B is A': diffusion against autoregression")
    )


def run(args: argparse.Namespace) -> int:
    """Measure; raises ConfigError, DataError or CheckpointError."""
    actions = {
        "likelihood": likelihood_command,
        "harness": harness_command,
        "infill": infill_command,
        "report": report_command,
        "reversal": reversal_command,
    }
    return actions[args.action].run(args)
