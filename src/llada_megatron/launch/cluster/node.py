"""The node that a process of a job runs on: its number, and where the nodes' store is, from SLURM's variables."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llada_megatron.launch.cluster.job import ATTEMPT_VARIABLE, RENDEZVOUS_VARIABLE, JobDirectory
from llada_megatron.llada_moe.errors import ConfigError


@dataclass(frozen=True)
class Node:
    """This node in an attempt of a job."""

    job: JobDirectory
    job_id: str
    attempt: int
    index: int
    """0 is the first node: it serves the store, and it alone writes verdicts."""
    count: int
    name: str
    host: str
    """Host of the store."""
    port: int
    """Port of the store."""

    @classmethod
    def here(cls, job: JobDirectory, environment: Mapping[str, str] = os.environ) -> Node:
        """The node that this process is on.

        Raises:
            ConfigError: the process was not started by a job's script.
        """
        count = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES")
        needed = (ATTEMPT_VARIABLE, RENDEZVOUS_VARIABLE, "SLURM_JOB_ID", "SLURM_NODEID", "SLURMD_NODENAME")
        missing = [name for name in needed if not environment.get(name)]
        if count is None or missing:
            missing += [] if count else ["SLURM_STEP_NUM_NODES"]
            raise ConfigError(f"{', '.join(missing)} not set: this program is started by the script of `llada submit`")
        attempt, rendezvous, job_id, index, name = (environment[variable] for variable in needed)
        host, _, port = rendezvous.rpartition(":")
        return cls(job, job_id, int(attempt), int(index), int(count), name, host, int(port))

    def names(self) -> list[str]:
        """The names of the job's nodes, in the order of their numbers.

        Raises:
            ConfigError: SLURM's list of them is missing, or names another number of nodes.
        """
        text = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        found = expand_nodes(text)
        if len(found) != self.count:
            raise ConfigError(f"SLURM_STEP_NODELIST ({text!r}) does not name the {self.count} nodes of the step")
        return found

    @property
    def first(self) -> bool:
        """Whether this is the first node, which decides for all."""
        return self.index == 0

    @property
    def address(self) -> str:
        """The address at which the other nodes reach this one.

        For the first node it is its name, for others the address from which they reach the first one.

        Raises:
            OSError: the first node's name cannot be resolved.
        """
        if self.first:
            return self.host
        family, kind, _, _, target = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: it only chooses the route
            return str(probe.getsockname()[0])

    def say(self, text: str) -> None:
        """Print one line with the time and the node to the job's output."""
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.name}: {text}", file=sys.stderr, flush=True)

    def event(self, event: str, **values: Any) -> None:
        """Note in the job's directory that something happened on this node; where that fails, say so and go on."""
        try:
            self.job.add_event(self.attempt, self.name, event, **values)
        except OSError as error:  # a full disk must not end training
            self.say(f"{event} could not be noted in {self.job.path}: {error.strerror}")


def expand_nodes(text: str) -> list[str]:
    """The names in SLURM's list of nodes: `n[01-03,7]x,m` are n01x, n02x, n03x, n7x and m.

    `scontrol show hostnames` does the same, but a container may not have it.
    """
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for literal, choices in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            endings = [literal] if literal else [each for span in choices.split(",") for each in _span(span)]
            expanded = [name + ending for name in expanded for ending in endings]
        names += expanded
    return names


def _span(text: str) -> list[str]:
    first, _, last = text.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
