"""Where a defect of this copy is reported: the address in the package's metadata, or where the copy came from."""

from __future__ import annotations

import json
from importlib import metadata

DISTRIBUTION = "llada-megatron"
_LABELS = ("issues", "bug tracker", "repository", "source", "homepage")
"""Labels of `project.urls` in the order in which they are taken."""


def report_address() -> str | None:
    """The address of the issues, else of the repository; None where neither the package nor pip knows one.

    pip remembers the repository that it installed from (PEP 610), which is that of a fork where it is one.
    """
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
    origin = _origin(distribution.read_text("direct_url.json"))
    urls = dict(_pair(entry) for entry in distribution.metadata.get_all("Project-URL") or [])
    return next((urls[label] for label in _LABELS if label in urls), origin)


def how_to_report() -> str:
    """What a message asks for: what to send, and where to."""
    place = report_address()
    where = f"at {place}" if place else "to whoever gave you this copy, since it names no address"
    return f"please report it {where}, with the trace above and what `llada env` prints"


def _pair(entry: str) -> tuple[str, str]:
    label, _, url = entry.partition(",")
    return label.strip().lower(), url.strip()


def _origin(direct_url: str | None) -> str | None:
    """The address of the repository in pip's record of an installation; None for a folder or an archive."""
    try:
        record = json.loads(direct_url or "{}")
        url = record["url"] if "vcs_info" in record else None
    except (ValueError, TypeError, KeyError):
        return None
    return url if isinstance(url, str) and url.startswith(("https://", "http://")) else None
