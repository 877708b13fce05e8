"""The program of the process with limits: it answers calls that come on standard input, until the input ends."""

from __future__ import annotations

import importlib
import json
import os
import signal
import struct
import sys
from typing import Any, BinaryIO

from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.llada_moe.guard.limits import Limits, allow_cpu, limit_memory

LENGTH = struct.Struct(">Q")
"""Before each message: the number of its bytes."""
_SHOWN = 300


def main(limits: Limits) -> None:
    """Answer calls `{"function": "module:name", "arguments": […], "cpu_s": seconds}`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that calls
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    limit_memory(limits.memory_bytes)
    while (call := read_message(calls)) is not None:
        request = json.loads(call)
        allow_cpu(request["cpu_s"])
        write_message(answers, _answer(request, limits))


def read_message(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream, also in the middle of a message."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    body = stream.read(LENGTH.unpack(head)[0])
    return body if len(body) == LENGTH.unpack(head)[0] else None


def write_message(stream: BinaryIO, body: bytes) -> None:
    """Write a message. Raises OSError: nobody reads."""
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def _answer(call: dict[str, Any], limits: Limits) -> bytes:
    try:
        module, _, name = call["function"].partition(":")
        value = getattr(importlib.import_module(module), name)(*call["arguments"])
        body = json.dumps({"value": value}).encode("ascii")
        if len(body) <= limits.answer_bytes:
            return body
        found = {"problem": f"gives more than {limits.answer_bytes // 2**20} MiB"}
    except LladaError as error:
        found = {"error": type(error).__name__, "message": _line(str(error))}
    except MemoryError:
        found = {"memory": True}
    except BaseException as error:  # libraries in other languages raise their panics past Exception
        found = {"problem": f"fails ({type(error).__name__}: {_line(str(error))})"}
    return json.dumps(found).encode("ascii")


def _line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


if __name__ == "__main__":
    main(Limits(**json.loads(sys.argv[1])))
