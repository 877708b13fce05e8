"""How the poem task is graded: an answer is right if the line that was asked for stands in it."""

from __future__ import annotations


def next_line(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """The metric `contained` of an answer to `next_line.yaml`."""
    return {"contained": float(doc["second"] in results[0])}


def previous_line(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """The same of `previous_line.yaml`."""
    return {"contained": float(doc["first"] in results[0])}
