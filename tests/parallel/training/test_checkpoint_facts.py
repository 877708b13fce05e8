"""What a run goes on from must be in the manifest of a checkpoint, each fact of its type."""

import copy
from pathlib import Path

import pytest

from llada_megatron.llada_moe.config import load_run, to_dict
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError
from llada_megatron.parallel.training.recovery.policy import History
from llada_megatron.parallel.training.state import check_facts

RUN = load_run("demo")
FACTS = {
    "model": to_dict(RUN.model),
    "run": to_dict(RUN),
    "step": 3,
    "recovery": to_dict(History()),
    "tokenizer": {"sha256": "0" * 64},
}


def test_what_a_run_writes_is_taken():
    check_facts(Path("c"), FACTS)
    check_facts(Path("c"), FACTS | {"tokenizer": None})


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["model"], {}),
        (["model", "num_layers"], "x"),
        (["model", "num_layers"], 10**400),
        (["run", "training"], []),
        (["run", "training"], {}),
        (["run", "data"], None),
        (["recovery"], {"decisions": 3}),
        (["tokenizer"], {}),
        (["tokenizer", "sha256"], 5),
        (["step"], None),
    ],
)
def test_what_no_run_writes_is_damage(keys, value):
    facts = copy.deepcopy(FACTS)
    inner = facts
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    if value is None:
        del inner[keys[-1]]
    with pytest.raises(DamagedCheckpointError, match="^c: its manifest"):
        check_facts(Path("c"), facts)
