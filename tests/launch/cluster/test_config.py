"""Cluster files: what is refused, and those that are shipped."""

import math
from pathlib import Path

import pytest

from llada_megatron.launch.cluster.config import CLUSTERS, ClusterConfig, load_cluster
from llada_megatron.launch.cluster.notation import gpu_request, host_list, seconds
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
        ("sbatch_options: [--outp=x]", "sbatch_options.0: --output is set by the script"),
        ('partition: "a\\ntouch x\\n#"', r"2: partition: expected one line of text, found the character '\n'"),
        ('account: "a\\x1b[2J"', r"2: account: expected one line of text, found the character '\x1b'"),
        ('sbatch_options: ["--comment=a\\r"]', "2: sbatch_options.0: expected one line of text"),
        ('environment: ["A=b\\nc"]', "2: environment.0: expected one line of text"),
        ('setup: ["echo \\a"]', r"2: setup.0: expected lines of shell, found the character '\x07'"),
        ("partition: a\x1b", r"2: not valid YAML: it holds the character '\x1b'"),
        ("environment: [A=b, LLADA_JOB=/x]", "environment.1: LLADA_JOB is set for every process by SLURM"),
        ("environment: [SLURM_JOB_NODELIST=n1]", "environment.0: SLURM_JOB_NODELIST is set for every process"),
        ("environment: [WORLD_SIZE=8]", "environment.0: WORLD_SIZE is set for every process"),
        ("environment: [port=1]", "environment.0: port is a variable that the job script needs itself"),
        ("environment: [IFS=x]", "environment.0: IFS is a variable that the job script needs itself"),
        ("environment: [PATH=/opt/bin]", "environment.0: without $PATH the job script would not find its programs"),
        (r"environment: ['PATH=/opt:\$PATH']", "environment.0: without $PATH"),
        ('setup: [module load a, "echo \'x"]', "2: setup.1: bash cannot read this: unexpected EOF while looking for"),
        ("setup: [cat <<END]", "2: setup.0: bash cannot read this: here-document"),
        ("setup: ['if true; then']", "setup: bash cannot read this: syntax error: unexpected end of file"),
        ("exclude: node[1-4", "2: exclude: 'node[1-4' is not the name of a node, or a list such as node[1-4,7]"),
        ("gpus_per_node: a100:4", "2: gpus_per_node: a100:4 is not ranks_per_node 2"),
        ("gpus_per_node: two", "2: gpus_per_node: 'two' is not a number of GPUs; write 2, a100:2 or gpu:a100:2"),
        ("gpus_per_node: gpu:2\nsbatch_options: [--gres=nvme:1]", "asks with --gres, and so do sbatch_options"),
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
        ("infinite", math.inf),
        ("UNLIMITED", math.inf),
        ("0", math.inf),
        ("1:2:3:4", None),
    ],
)
def test_time_limits_are_read_as_slurm_writes_them(text, expected):
    """The forms are those of sbatch(1), --time."""
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("node[1-4,7]", ["node[1-4,7]"]),
        ("node[01-04,7]x, bad-01,rack[0-2]n[1-2]", ["node[01-04,7]x", "bad-01", "rack[0-2]n[1-2]"]),
        ("/home/me/bad-nodes", ["/home/me/bad-nodes"]),
        ("node[1-4", None),
        ("node[1-]", None),
        ("node[]", None),
        ("n1 n2", None),
        ("n1,,n2", None),
        ("", None),
    ],
)
def test_lists_of_hosts_are_read_as_slurm_writes_them(text, parts):
    assert host_list(text) == parts


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, (4, "gpus-per-node", "4")),
        ("a100-sxm:4", (4, "gpus-per-node", "a100-sxm:4")),
        ("gpu:4", (4, "gres", "gpu:4")),
        ("gpu:h100:8", (8, "gres", "gpu:h100:8")),
        ("-1", None),
        ("a100:", None),
    ],
)
def test_gpus_are_asked_for_as_a_site_wants_it(value, expected):
    """The forms are those of sbatch(1), --gpus-per-node and --gres."""
    found = gpu_request(value)
    assert (found and (found.count, found.option, found.value)) == expected


def test_what_sbatch_takes_a_cluster_file_takes(tmp_path):
    lines = [
        "ranks_per_node: 2",
        "gpus_per_node: 2",
        "exclude: node[1-4,7], bad",
        "time: UNLIMITED",
        "memory_per_node: 64gb",
        "setup:",
        "  - |",
        "    if true; then",
        "    \tmodule load a",
        "    fi",
        "  - for i in 1 2; do",
        "  - echo $i",
        "  - done",
    ]
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\n")
    cluster = load_cluster(tmp_path / "c.yaml")
    assert (cluster.gpus, cluster.excluded) == (2, ["node[1-4,7]", "bad"])
    (tmp_path / "again.yaml").write_text(dump_yaml(cluster))
    assert load_cluster(tmp_path / "again.yaml") == cluster
