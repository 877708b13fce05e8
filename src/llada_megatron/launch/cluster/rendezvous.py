"""The rendezvous of a job's nodes: torch's own, with ranks in the order of the nodes and a new store for each start."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousInfo, RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.parallel.machine import raise_open_files

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.node import Node

STORE_TIMEOUT_S = 30
"""Time limit of one request to the store: when the first node is gone, the others end after this long."""

KEEP_ALIVE_S, MISSED = 3, 5
"""An agent sends a heartbeat every KEEP_ALIVE_S seconds; after MISSED missing ones the others take it for dead."""

_POLL_S = 0.5


def open_store(node: Node, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> Store:
    """The store of this attempt, which the first node serves and the others connect to.

    Args:
        timeout_s: how long another node waits for the first one.
        stopped: whether to give up waiting.

    Raises:
        ResourceError: the first node cannot be reached in time, the port is taken, or the job is to stop.
    """
    raise_open_files()  # it holds connections of all ranks, as does the one that this agent may serve to them
    deadline = time.monotonic() + timeout_s
    while not node.first:
        with contextlib.suppress(OSError), socket.create_connection((node.host, node.port), 5):
            break
        if stopped() or time.monotonic() > deadline:
            raise ResourceError(f"no agent on the first node answers at {node.host}:{node.port}")
        time.sleep(_POLL_S)
    try:
        store = TCPStore(
            node.host,
            node.port,
            is_master=node.first,
            wait_for_workers=False,
            timeout=timedelta(seconds=2 * STORE_TIMEOUT_S),
        )
    except DistError as error:
        raise ResourceError(f"the nodes cannot connect to the store at {node.host}:{node.port}: {error}") from error
    store.set_timeout(timedelta(seconds=STORE_TIMEOUT_S))
    return PrefixStore(f"job-{node.job_id}.{node.attempt}", store)


class JobRendezvous(DynamicRendezvousHandler):
    """Torch's rendezvous of the agents, with a new store for the ranks in each round.

    Torch would keep one store for the ranks over all rounds. It may be on a node that is gone, and it still holds the
    keys of the last round. Here each round gets a new one, on the node of rank 0.
    """

    node: Node
    nodes: list[str]
    """Names of the nodes of the current round, in the order of their ranks."""
    round_store: Store
    """The store by which the agents communicate in the current round."""

    @classmethod
    def of(cls, node: Node, store: Store, min_nodes: int, late_s: float, timeout_s: float) -> JobRendezvous:
        """A rendezvous of at least `min_nodes` of the job's nodes.

        Args:
            late_s: how many seconds to wait for the other nodes once `min_nodes` are there.
            timeout_s: how many seconds to wait for `min_nodes`.
        """
        backend = C10dRendezvousBackend(store, "nodes")
        limits = RendezvousTimeout(join=timedelta(seconds=timeout_s), last_call=timedelta(seconds=late_s))
        rendezvous = cls.from_backend(
            "nodes", store, backend, min_nodes, node.count, node.address, limits, KEEP_ALIVE_S, MISSED
        )
        rendezvous.node, rendezvous.nodes = node, []
        return rendezvous

    @property
    def use_agent_store(self) -> bool:
        """Whether the ranks use a store that an agent serves: they always do."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes; ranks are in the order of SLURM's numbers of the nodes.

        Raises:
            RendezvousError, DistError: torch's own errors, when the nodes do not find each other.
        """
        info = super().next_rendezvous()
        store, me = info.store, self.node
        store.set(f"node/{info.rank}", json.dumps([me.index, me.name, repr(self._this_node)]))
        met = sorted(json.loads(store.get(f"node/{rank}")) for rank in range(info.world_size))
        self.round_store, self.nodes = store, [name for _, name, _ in met]
        self._descriptors = {name: descriptor for _, name, descriptor in met}
        rank = self.nodes.index(me.name)
        if rank == 0:
            self._ranks_store = TCPStore(me.address, 0, is_master=True, wait_for_workers=False)
            store.set("ranks", json.dumps([me.address, self._ranks_store.port]))
        host, port = json.loads(store.get("ranks"))
        return RendezvousInfo(store, rank, info.world_size, RendezvousStoreInfo(host, port))

    def require_open(self) -> None:
        """Raise RendezvousClosedError when the first node has closed the rendezvous because there is a verdict."""
        if self.is_closed():
            raise RendezvousClosedError

    def absent(self) -> list[str]:
        """Names of the nodes that have left this round, or whose heartbeats have been missing for too long."""
        with self._heartbeat_lock:
            self._state_holder.sync()
            state = self._state_holder.state
        there = {repr(node) for node in (*state.participants, *state.wait_list)}
        return [name for name in self.nodes if self._descriptors[name] not in there]
