"""The program of one sampling rank: `llada sample` with a layout of more than one process starts it once per rank."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llada_megatron.launch.processes import PARENT_VARIABLE, StopRequest
from llada_megatron.launch.rank import run_local_rank
from llada_megatron.launch.sampling import Request
from llada_megatron.llada_moe.config.schema import LayoutConfig
from llada_megatron.parallel.lifetime import die_with_parent


def write_request(request: Request, path: Path) -> None:
    """Leave a request for the ranks."""
    path.write_text(json.dumps(asdict(request)), "utf-8")


def read_request(path: Path) -> Request:
    """The request that `write_request` left."""
    values = json.loads(path.read_text("utf-8"))
    return Request(**values | {"layout": LayoutConfig(**values["layout"])})


def main(path: str) -> int:
    """Work on the request in the JSON file `path` as the rank that the environment names."""
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    request = read_request(Path(path))

    def work(_: StopRequest) -> dict[str, Any]:
        from llada_megatron.parallel import device

        device.install()
        from llada_megatron.launch.sampling import sample_all
        from llada_megatron.parallel import topology
        from llada_megatron.parallel.inference import load_checkpoint

        topology.join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        topology.initialize(request.layout, request.seed)
        loaded = load_checkpoint(request.checkpoint, request.layout)
        samples, passes = sample_all(loaded, request)
        topology.leave()
        return {"samples": [asdict(sample) for sample in samples], "passes": passes, "checkpoint": str(loaded.path)}

    return run_local_rank(work, request.layout, Path(path).parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
