"""What a model is said to be worth: estimators, the queries that they ask, results on disk, verdicts."""

from __future__ import annotations

from benchmarks.mutant_groups.of_the_model import Group

_ENUMERATED = "tests/parallel/evaluation/test_query_scorer.py -k 'errors or guidance or once or exact'"

GROUPS: list[Group] = [
    (
        "evaluation",
        "llada_moe/evaluation/estimators.py",
        "tests/llada_moe/evaluation/test_estimators.py",
        [
            ("torch.arange(size) * length // size) % length + 1", "torch.arange(size)) % length + 1"),
            ("pair.question * _OPTIONS + pair.option + 1", "pair.question"),
            ("(b, each[sample]) not in seen", "True"),
            ("error = None if count == 1 else", "error = 0.0 if count == 1 else"),
        ],
    ),
    (
        "evaluation",
        "llada_moe/evaluation/estimators.py",
        _ENUMERATED,
        [
            ("sum(length / len(masked) * sums[p, b, masked]", "sum(sums[p, b, masked]"),
            ("statistics.stdev(strata) / math.sqrt(count)", "statistics.stdev(strata)"),
        ],
    ),
    (
        "evaluation",
        "llada_moe/evaluation/queries.py",
        "tests/llada_moe/evaluation/test_estimators.py",
        [
            ("max(given, number * block)", "number * block"),
            ("at + longest - len(before))", "at + longest)"),
        ],
    ),
    (
        "evaluation",
        "parallel/evaluation/query_scorer.py",
        _ENUMERATED,
        [
            ("unconditional + (1.0 + self._guidance) *", "unconditional + self._guidance *"),
            ("min(query.given, len(text)) if masked else 0", "0"),
            ("AttentionPattern(kind.block, doubled=True,", "AttentionPattern(kind.block, doubled=False,"),
            ('for half in ("tokens", "clean"):', 'for half in ("tokens", "tokens"):'),
        ],
    ),
    (
        "evaluation",
        "parallel/evaluation/likelihood_file.py",
        "tests/launch/evaluation/test_likelihood_command.py -k 'continued or figures'",
        [
            ("os.truncate(self.path, end)", "pass"),
            ("if found != self._protocol:", "if False:"),
        ],
    ),
    (
        "evaluation",
        "launch/evaluation/published.py",
        "tests/launch/evaluation/test_published.py",
        [
            ("<= NEAR for value in", "<= 3 * NEAR for value in"),
            ("100 * value for name, value", "value for name, value"),
        ],
    ),
]
