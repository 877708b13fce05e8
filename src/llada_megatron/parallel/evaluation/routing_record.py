"""Which experts the routers of a model choose, pass by pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter
from numpy.typing import NDArray


class RoutingRecord:
    """The choices of the passes since the last `take`, of every router of a model that is spread over these ranks."""

    def __init__(self, routers: list[TopKRouter], top_k: int) -> None:
        """`routers`: those of this rank's stage, which may have none (collective)."""
        self.top_k = top_k
        self._chosen: dict[int, list[torch.Tensor]] = {router.layer_number: [] for router in routers}
        self._scores: dict[int, list[torch.Tensor]] = {router.layer_number: [] for router in routers}
        self.layers: list[int] = sorted(set().union(*_of_all_ranks(list(self._chosen))))
        """Numbers (from 1) of the layers with experts, of all stages."""

    def add(self, layer: int, routing_map: torch.Tensor) -> None:
        """Keep the choices of one pass: `routing_map` `[tokens, experts]`, not zero where a token goes to an expert."""
        experts = (routing_map.detach() != 0).to(torch.uint8).topk(self.top_k, dim=1).indices
        self._chosen[layer].append(experts.sort(dim=1).values.to("cpu", torch.int16))

    def add_scores(self, router: TopKRouter, logits: torch.Tensor) -> None:
        """Keep what a router ranks the experts by, from its logits `[seq, batch, experts]`."""
        scores = logits.detach().float().flatten(0, -2)
        if router.config.moe_router_score_function == "sigmoid":
            scores = scores.sigmoid()
        if router.expert_bias is not None:
            scores = scores + router.expert_bias
        self._scores[router.layer_number].append(scores.cpu())

    def take(self, tokens: int) -> NDArray[np.int16]:
        """The choices `[layers, tokens, top_k]`, experts ascending, tokens in the order of the routers' inputs
        (collective). `tokens`: how many ran since the last call; data-parallel ranks ran the same ones."""
        return _whole(self._chosen, self.layers, tokens)

    def take_scores(self, tokens: int) -> NDArray[np.float32]:
        """The scores `[layers, tokens, experts]`, in the same order, of the passes since the last call (collective)."""
        return _whole(self._scores, self.layers, tokens)


def _whole(kept: dict[int, list[torch.Tensor]], layers: list[int], tokens: int) -> NDArray:
    """What the ranks kept, `[layers, tokens, …]`. Of each layer the first ranks that hold it are its tensor-parallel
    ranks in order, and each saw all tokens or, under sequence parallelism, its part of them."""
    mine = {layer: torch.cat(parts).numpy() for layer, parts in kept.items()}
    for parts in kept.values():
        parts.clear()
    ranks = _of_all_ranks(mine)
    whole = []
    for layer in layers:
        seen = [rank[layer] for rank in ranks if layer in rank]
        whole.append(np.concatenate(seen[: tokens // len(seen[0])]))
    return np.stack(whole)


def _of_all_ranks(mine: Any) -> list[Any]:
    """A value of each rank, in their order (collective)."""
    ranks = torch.distributed.get_world_size()
    if ranks == 1:
        return [mine]
    values: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(values, mine)
    return values


@contextmanager
def recorded(model: torch.nn.Module, scores: bool = False) -> Iterator[RoutingRecord]:
    """Record the routers of this rank's stage for as long as the block lasts, their scores too if wanted (collective).

    Raises:
        ValueError: no stage has a router.
    """
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    record = RoutingRecord(routers, model.config.moe_router_topk)
    if not record.layers:
        raise ValueError("a model without experts has no routing")

    def hook(router: TopKRouter, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        record.add(router.layer_number, output[1])

    hooks = [router.register_forward_hook(hook) for router in routers]
    if scores:
        for router in routers:
            _watch_scores(router, record)
    try:
        yield record
    finally:
        for handle in hooks:
            handle.remove()
        if scores:
            for router in routers:
                del router.gating  # the method of the class is found again


def _watch_scores(router: TopKRouter, record: RoutingRecord) -> None:
    gating = router.gating  # a method, which no hook reaches

    def watched(*inputs: Any, **named: Any) -> torch.Tensor:
        logits = gating(*inputs, **named)
        record.add_scores(router, logits)
        return logits

    router.gating = watched
