"""The process of the preflight that uses the devices, so that a hung driver hangs it alone and no memory stays taken.

It reads one JSON list of arguments per line and answers each with a line: `["look"]`, or `["all_reduce", …]`.
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
    """The caller's end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def start(self, *request: Any) -> None:
        """Have it begin with something; `answer` fetches the result. One that was ended is started again."""
        if self._process is None:
            program = python_program("llada_megatron.launch.cluster.preflight.device_process")
            self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The result; `error` instead of it where it failed, died, or took longer (which ends it)."""
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
        """End the process, with whatever hangs in it."""
        if self._process is not None:
            self._process.kill()
            self._process = None


def serve() -> None:
    """The process's end: answer until the caller is gone."""
    die_with_parent()
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    from llada_megatron.launch.cluster.preflight import device_checks

    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            result = device_checks.look() if what == "look" else {"seconds": device_checks.all_reduce(*arguments)}
        except Exception as error:  # whatever a driver or a network says: it is a finding
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    serve()
