"""The errors a user can meet. Each message says what was wrong, where, and what to do."""

from __future__ import annotations


class LladaError(Exception):
    """A failure that the user can act on; the command line prints its message without a stack trace."""

    exit_code = 1


class ConfigError(LladaError):
    """A configuration or command line that cannot work; raised before any process starts."""

    exit_code = 2


class DataError(LladaError):
    """Text, tokenizer or prepared data that cannot be used."""


class CheckpointError(LladaError):
    """A checkpoint that is missing, damaged, unsafe, or of another model."""


class ResourceError(LladaError):
    """The machine cannot give what was asked for: devices, memory or disk."""


class MemoryRanOutError(ResourceError):
    """Memory of a GPU or of the machine ran out; says where, and the command line adds what to lower."""
