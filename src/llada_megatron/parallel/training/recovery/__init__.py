"""What a run does about a step that went wrong: see `policy`."""

from __future__ import annotations
