"""A model that rank 0 drives: ragged batches are exact, and every layout gives what one process gives."""

from __future__ import annotations

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.queries import Pair
from llada_megatron.parallel import topology
from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint, open_checkpoint
from llada_megatron.parallel.evaluation.served_model import ServedModel
from llada_megatron.parallel.sampling.prompts import Prompt
from llada_megatron.parallel.sampling.settings import Settings
from tests.launch.sampling.checkpoints import checkpoint
from tests.ranks import run_ranks

TEXTS = ["a", "bc def", "the quick brown fox", "0", "x" * 31, "when in", "q q q q", "end."]
LAYOUTS = {"TP2": LayoutConfig(tensor_parallel=2), "DP2": LayoutConfig(data_parallel=2)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("dense"))


def served_by(loaded, path):
    return ServedModel(loaded, LikelihoodProtocol(samples=8), Settings(checkpoint=str(path)))


def prompts_of(served):
    return [Prompt.of(served.tokenizer.encode(text), n).with_length(7) for n, text in enumerate(TEXTS, start=1)]


def pairs_of(served):
    return [Pair(tuple(served.tokenizer.encode(text)), (40, 41, 42), n) for n, text in enumerate(TEXTS)]


def answers(served):
    """Log-likelihoods, greedy verdicts and texts."""
    nats = [each.nats for each in served.log_likelihoods(pairs_of(served))]
    return nats, served.greedy(pairs_of(served)), [result.tokens for result in served.generate(prompts_of(served))]


def served_answers(path, layout):
    """On a rank: what rank 0 is answered."""
    topology.initialize(layout, 0)
    served = served_by(load_checkpoint(path, layout), path)
    found = None
    if torch.distributed.get_rank() == 0:
        found = answers(served)
        served.release()
    else:
        served.follow()
    torch.distributed.barrier()
    return found


def test_ragged_prompts_give_what_each_alone_gives(dense):
    """A peer pads a batch on the left and passes no attention mask: there more than one prompt changes the answers."""
    with open_checkpoint(dense) as loaded:
        served = served_by(loaded, dense)
        prompts, pairs = prompts_of(served), pairs_of(served)
        together = [result.tokens for result in served.generate(prompts)]
        assert together == [served.generate([prompt])[0].tokens for prompt in prompts]
        alone = [served.log_likelihoods([pair])[0].nats for pair in pairs]
        assert [each.nats for each in served.log_likelihoods(pairs)] == pytest.approx(alone, abs=1e-4)
        with pytest.raises(ConfigError, match="new tokens: the model takes"):
            served.room(10**6)


def test_ranks_wait_for_the_first_as_long_as_it_takes(dense, monkeypatch):
    """Collectives of the world fail after ten minutes, in which rank 0 may still fetch data or grade answers."""
    told = []

    def broadcast(what, src, group=None):
        told.append((group or torch.distributed.group.WORLD)._get_backend(torch.device("cpu")).options._timeout)

    with open_checkpoint(dense) as loaded:
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
        served = served_by(loaded, dense)
        served._announce("greedy", [])
        served.release()
        served.follow()
        monkeypatch.undo()
    assert len(told) == 3 and min(told).days >= 1


def test_a_layout_answers_what_one_process_answers(dense):
    with open_checkpoint(dense) as loaded:
        nats, greedy, texts = answers(served_by(loaded, dense))
    for name, layout in LAYOUTS.items():
        ranks = run_ranks(served_answers, layout.world_size, dense, layout, timeout=90.0)
        assert ranks[1] is None
        found = ranks[0]
        assert found[0] == pytest.approx(nats, abs=1e-4), name
        assert found[1:] == (greedy, texts), name
