"""Cluster files: what is refused, and those that are shipped."""

from pathlib import Path

import pytest

from llada_megatron.launch.cluster.config import CLUSTERS, ClusterConfig, load_cluster, seconds
from llada_megatron.llada_moe.config import dump_yaml
from llada_megatron.llada_moe.errors import ConfigError

SHIPPED = sorted((Path(__file__).resolve().parents[3] / "configs" / "clusters").glob("*.yaml"))


def test_a_shipped_cluster_loads_by_name_and_survives_being_written(tmp_path):
    assert {"cpu", "dgx-h100", "h200-8x"} <= {path.stem for path in SHIPPED}
    for path in SHIPPED:
        cluster = load_cluster(path.stem)
        assert cluster == load_cluster(path)
        (tmp_path / "c.yaml").write_text(dump_yaml(cluster))
        assert load_cluster(tmp_path / "c.yaml") == cluster


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("partion: main", "2: partion: unknown key; did you mean 'partition'?"),
        ("ranks_per_node: 0", "ranks_per_node: 0 must be at least 1"),
        ("gpus_per_node: 4", "2: gpus_per_node: 4 is not ranks_per_node 2"),
        ("time: 1 day", "'1 day' is not a time limit; write days-hours:minutes:seconds"),
        ("time: 0:30", "less than a minute"),
        ("time: 0-00:05:00", "300 is not less than the time limit 0-00:05:00 = 300 s"),
        ("signal_before_end_s: 0", "0 must lie between 1 and 65535"),
        ("environment: [PATH]", "environment.0: 'PATH' is not NAME=value"),
        ("exclude: ['n1 n2']", "exclude.0: 'n1 n2' is not the name of a node"),
        ("lost_node: wait", "expected one of shrink, requeue, found 'wait'"),
        ("memory_per_node: lots", "'lots' is not a size"),
        ("sbatch_options: [--nodes=3]", "sbatch_options.0: --nodes is set by the script"),
        ("sbatch_options: [--partition=x]", "sbatch_options.0: --partition has a key of its own; write partition: …"),
        ("sbatch_options: [-p x]", "sbatch_options.0: '-p x' is not an option such as --comment=llada"),
        ("container: {image: x, mounts: [data]}", "container.mounts.0: 'data' is not HOST:CONTAINER"),
        ("preflight: {timeout_s: 0}", "preflight.timeout_s: 0 must be greater than 0"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_what_to_do(tmp_path, line, said):
    first = "" if line.startswith("ranks") else "ranks_per_node: 2\n"
    (tmp_path / "c.yaml").write_text(f"{first}{line}\n")
    with pytest.raises(ConfigError) as error:
        load_cluster(tmp_path / "c.yaml")
    assert said in str(error.value) and "c.yaml:" in str(error.value)


def test_an_unknown_name_lists_the_clusters():
    with pytest.raises(ConfigError, match="no cluster 'dgx-h10'; did you mean 'dgx-h100'"):
        load_cluster("dgx-h10")
    assert CLUSTERS.what == "cluster" and ClusterConfig(ranks_per_node=1).gpus_per_node == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:30", 7230),
        ("1-00", 86400),
        ("1-12:30", 131400),
        ("2-01:00:05", 176405),
        ("infinite", None),
        ("1:2:3:4", None),
    ],
)
def test_time_limits_are_read_as_slurm_writes_them(text, expected):
    """The forms are those of sbatch(1), --time."""
    assert seconds(text) == expected
