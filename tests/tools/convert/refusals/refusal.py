"""What a refused conversion must do: name what is wrong and what to do, and leave nothing at the target."""

import json
import shutil

import pytest

from llada_megatron.llada_moe.errors import CheckpointError
from tests.tools.convert.checkpoints import config_of, tensors_of, to_sharded, write

GATE = "model.layers.1.mlp.gate.weight"
QUERY = "model.layers.2.self_attn.q_proj.weight"


def refused(source, *parts, error=CheckpointError, convert=to_sharded, **options):
    """The message of a conversion that is refused, which holds each part and leaves no target."""
    target = source.with_name("target")
    with pytest.raises(error) as caught:
        convert(source, target, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert not target.exists()
    return message


def changed(directory, **values):
    """Other values in `config.json`; None removes the key."""
    config = config_of("tiny-moe-softmax") | values
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return directory


def rewritten(source, change, name="tiny-moe-softmax"):
    """The checkpoint with `change` made to a copy of its tensors."""
    shutil.rmtree(source)
    tensors = dict(tensors_of(name))
    change(tensors)
    return write(source, tensors, config_of(name), files=3)
