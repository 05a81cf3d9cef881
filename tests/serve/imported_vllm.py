"""The command `vllm`, imported once and run for many command lines: each in a process forked from this one.

Importing vLLM takes a core ten seconds and more, and what a wrong argument leads to comes right after it.

    python -m tests.serve.imported_vllm FILE

FILE has one line of JSON for each run: an `Order`. What became of it is printed as one line of JSON: a `Run`.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

RUN_SECONDS = 120
"""Bound for one run; the kernel ends one that takes longer by SIGALRM."""

LEAVE_SECONDS = 10.0
"""How long what a run has started may take to end after it."""


@dataclass(frozen=True)
class Order:
    """A command line with its whole environment, and the file for what it prints."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    log: str


@dataclass(frozen=True)
class Run:
    """How a command ended: its exit code (minus a signal's number), and whether a process of its session is left."""

    name: str
    exit_code: int
    left: bool


def run(order: Order) -> Run:
    """Runs `vllm` once, in a process and session of its own."""
    pid = os.fork()
    if pid == 0:
        become(order)
    _, status = os.waitpid(pid, 0)
    return Run(order.name, os.waitstatus_to_exitcode(status), not gone(pid))


def become(order: Order) -> None:
    """Goes on as the console script does, to the process's end."""
    from vllm.entrypoints.cli.main import main

    os.setsid()
    signal.alarm(RUN_SECONDS)
    with open(order.log, "wb") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(order.environment)
    sys.argv = list(order.argv)
    exit_code: object = 1
    try:
        exit_code = main()
    except SystemExit as end:
        exit_code = end.code
        if isinstance(exit_code, str):
            print(exit_code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        # Without taking vLLM's modules apart, for which a forked process would first copy them: 4 s.
        os._exit(exit_code if isinstance(exit_code, int) else 0 if exit_code is None else 1)


def gone(session: int) -> bool:
    """Waits for all processes of a session's first group to end, and says whether they have."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    return False


if __name__ == "__main__":
    # What `vllm serve` imports by itself before it looks at an argument.
    import vllm.entrypoints.cli.main
    import vllm.entrypoints.openai.api_server  # noqa: F401

    for line in Path(sys.argv[1]).read_text().splitlines():
        print(json.dumps(asdict(run(Order(**json.loads(line))))), flush=True)
