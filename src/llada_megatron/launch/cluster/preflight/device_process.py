"""The process of the preflight that uses the devices: a driver that hangs blocks only this process, and its memory is
freed at its end.

It reads requests, one JSON list per line, and answers each with a line of JSON: `["look"]`, `["all_reduce", …]`, or
`["add_up", …]`, which the process of a node asks of one process for each of its GPUs.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Any

from llada_megatron.launch.ranks.local import python_program
from llada_megatron.parallel.parent_death import die_with_parent


class DeviceProcess:
    """Starts the process, sends it requests and reads its answers."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def start(self, *request: Any) -> None:
        """Send a request, whose result `answer` returns; starts the process where it does not run."""
        if self._process is None:
            program = python_program("llada_megatron.launch.cluster.preflight.device_process")
            self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The result of the request, or `error` where it failed, the process died, or the time was up (`limit_s`).

        A process that takes too long is ended.
        """
        assert self._process is not None and self._process.stdout is not None
        line, deadline, stream = b"", time.monotonic() + limit_s, self._process.stdout.fileno()
        while not line.endswith(b"\n"):
            if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.end()
                return {"error": f"no answer within {limit_s:.0f} s"}
            part = os.read(stream, 2**16)
            if not part:
                self.end()
                return {"error": "the process that uses the devices was killed, or could not start"}
            line += part
        return json.loads(line)

    def end(self) -> None:
        """End the process, even if it hangs."""
        if self._process is not None:
            self._process.kill()
            self._process = None


def serve() -> None:
    """The program of the process: answer requests until the caller is gone."""
    die_with_parent()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not be taken for an answer
    from llada_megatron.launch.cluster.preflight import device_checks, network_check

    actions = {"look": device_checks.look, "all_reduce": network_check.all_reduce, "add_up": network_check.add_up}
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            result = actions[what](*arguments)
        except Exception as error:  # any error of a driver or of the network is a result of the check
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    serve()
