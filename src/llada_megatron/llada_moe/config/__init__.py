"""Typed configuration: YAML to dataclasses, with every mistake refused at its file, line and key."""

from llada_megatron.llada_moe.config.checks import validate_run
from llada_megatron.llada_moe.config.loader import find_model_and_run, load_model, load_run
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig, validate_model
from llada_megatron.llada_moe.config.parsing import dump_yaml, from_dict, to_dict
from llada_megatron.llada_moe.config.run import RunConfig

__all__ = [
    "MoEConfig",
    "ModelConfig",
    "RunConfig",
    "dump_yaml",
    "find_model_and_run",
    "from_dict",
    "load_model",
    "load_run",
    "to_dict",
    "validate_model",
    "validate_run",
]
