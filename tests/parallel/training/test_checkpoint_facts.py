"""What a run goes on from must be in the manifest of a checkpoint, each fact of its type."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest

from llada_megatron.llada_moe.config import load_run, to_dict
from llada_megatron.llada_moe.evaluation.likelihood import Likelihood
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError
from llada_megatron.parallel.training.recovery.policy import History
from llada_megatron.parallel.training.state import RunState, check_facts

RUN = load_run("demo")
FACTS = {
    "model": to_dict(RUN.model),
    "run": to_dict(RUN),
    "step": 3,
    "recovery": to_dict(History()),
    "tokenizer": {"sha256": "0" * 64},
}


def test_a_validation_belongs_to_the_checkpoint_of_its_step_alone():
    tokenizer = SimpleNamespace(sha256="0" * 64, vocab_size=256, suffix=".json")
    sets = [SimpleNamespace(sha256=None, tokenizer=tokenizer)]
    state = RunState(RUN, make_objective(RUN.objective), [], None, sets, step=5)
    assert "validation" not in state._metadata()
    state.validated(Likelihood(nats=6.0, tokens=4, sequences=1))
    facts = state._metadata()["validation"]
    assert facts == {"step": 5, "nats_per_token": 1.5, "pattern": str(state.objective.pattern(4))}
    state.step = 6
    assert "validation" not in state._metadata()


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
