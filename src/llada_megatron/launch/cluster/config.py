"""What a cluster is, as far as a job needs to know: the YAML files in configs/clusters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """An image that every step runs in (pyxis: `srun --container-image`)."""

    image: str
    mounts: list[str] = field(default_factory=list)
    """`HOST:CONTAINER` paths; the run's data and output directory must be among them."""
    options: list[str] = field(default_factory=list)
    """Further options of srun, one each."""


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What a node must show before a job uses it."""

    timeout_s: int = 120
    """A node that has not answered by then is named and excluded."""
    min_free_disk_gb: float = 1.0
    """In the run's output directory and in the temporary directory of each node."""
    min_memory_gb: float = 0.0
    """Host memory that is free on each node; 0 = not asked."""
    min_matmul_tflops: float = 0.0
    """Large matrix product of each GPU (or of the node's CPU); 0 = measured and reported only."""
    max_clock_skew_s: float = 5.0


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One cluster, or one partition of it. Keys without a value here are left to SLURM's own defaults."""

    ranks_per_node: int
    """Processes on a node: one per GPU, or as many as the CPUs carry where there is none."""
    gpus_per_node: int = 0
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    cpus_per_node: int | None = None
    """Cores that the one task on a node asks for; null = all of an exclusive node."""
    memory_per_node: str | None = None
    """As SLURM writes it (`64G`; `0` = all)."""
    time: str = "1-00:00:00"
    """Limit of one allocation (days-hours:minutes:seconds); the job is requeued before it ends and goes on."""
    exclusive: bool = True
    exclude: list[str] = field(default_factory=list)
    """Nodes that are not to be used."""
    sbatch_options: list[str] = field(default_factory=list)
    """Further options of sbatch, one each, for example `--comment=llada`."""
    container: ContainerConfig | None = None
    setup: list[str] = field(default_factory=list)
    """Lines of the script before anything starts: `module load …`, `source …/bin/activate`."""
    python: str | None = None
    """Interpreter on the nodes; null = `python` in a container, else the one that runs `llada submit`."""
    environment: list[str] = field(default_factory=list)
    """`NAME=value` for every process."""
    signal_before_end_s: int = 300
    """How long before the time limit the job saves and is requeued."""
    requeue: bool = True
    """Whether the job may be queued again after a time limit, a preemption or a fault."""
    max_requeues: int = 100
    max_restarts: int = 3
    """Restarts of the ranks inside a job, and of the job, without a new checkpoint in between."""
    lost_node: Literal["shrink", "requeue"] = "shrink"
    """A node is gone: go on without it where the layout allows a smaller data_parallel, or queue the job again."""
    lost_node_wait_s: int = 30
    """How long the other nodes wait for it to come back."""
    rendezvous_timeout_s: int = 600
    """How long the nodes of a job wait for each other."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
