"""The schedule of a pipeline, against its closed form."""

from itertools import pairwise

import pytest

from llada_megatron.llada_moe.planning.timeline import one_forward_one_backward


@pytest.mark.parametrize(("stages", "count"), [(1, 3), (2, 4), (4, 8), (4, 2)])
def test_equal_stages_wait_for_the_bubble(stages, count):
    slots = one_forward_one_backward([3.0] * stages, count)
    assert max(slot.end for slot in slots) == pytest.approx(3.0 * (count + stages - 1))
    assert len(slots) == 2 * stages * count


def test_a_pass_follows_what_it_needs():
    slots = one_forward_one_backward([3.0, 4.0, 5.0], 6)
    ends = {(slot.stage, slot.forward, slot.micro_batch): slot.end for slot in slots}
    for slot in slots:
        before = (slot.stage - 1, True) if slot.forward else (slot.stage + 1, False)
        assert slot.start >= ends.get((*before, slot.micro_batch), 0.0)
    for stage in range(3):
        mine = sorted((slot for slot in slots if slot.stage == stage), key=lambda slot: slot.start)
        assert all(first.end <= second.start + 1e-9 for first, second in pairwise(mine))
