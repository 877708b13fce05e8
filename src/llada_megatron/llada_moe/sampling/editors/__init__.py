"""Editors: rules by which tokens that were already sampled may still change."""

from llada_megatron.llada_moe.sampling.editors.editor import (
    Editor,
    NoEditor,
    Revision,
    RunningEditor,
    commit,
    never_written,
    trained_for_editing,
)
from llada_megatron.llada_moe.sampling.editors.levenshtein import Levenshtein
from llada_megatron.llada_moe.sampling.editors.token_editing import TokenEditing
from llada_megatron.llada_moe.sampling.editors.wino import WideIn, Wino

__all__ = [
    "Editor",
    "Levenshtein",
    "NoEditor",
    "Revision",
    "RunningEditor",
    "TokenEditing",
    "WideIn",
    "Wino",
    "commit",
    "never_written",
    "trained_for_editing",
]
