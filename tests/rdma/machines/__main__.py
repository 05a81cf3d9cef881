"""The machines from a shell.

    python -m tests.rdma.machines prepare                 installs and fetches what is missing
    python -m tests.rdma.machines run COMMAND...          boots both, runs the command in both

In each machine MACHINE is 0 or 1. The exit code of `run` is the larger one of the two commands'; their output has the
machine's index in front of every line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from . import packages
from .command import Command
from .errors import CannotRun, MachineError
from .kernel import kernel
from .pair import booted

POLL_SECONDS = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Does what the words say and returns the exit code; 2 if the machines cannot run, 3 if they failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.rdma.machines", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("prepare", help="install and fetch what the machines need")
    run = verbs.add_parser("run", help="run one command in both machines")
    run.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for the command; default: 600")
    run.add_argument("command", nargs=argparse.REMAINDER, help='"python" is the interpreter that runs this')
    args = parser.parse_args(argv)
    try:
        if args.verb == "prepare":
            return _prepare()
        if not args.command:
            parser.error("a command is missing after `run`")
        return _run(args.command, args.timeout)
    except (CannotRun, MachineError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, CannotRun) else 3


def _prepare() -> int:
    packages.install()
    found = kernel()
    print(f"the machines boot kernel {found.version}, kept in {found.root}")
    return 0


def _run(argv: Sequence[str], timeout: float) -> int:
    deadline = time.monotonic() + timeout
    with booted() as pair:
        commands = [machine.start(argv) for machine in pair]
        shown = ["", ""]
        while True:
            running = [command for command in commands if command.exit_code is None]
            for index, command in enumerate(commands):
                shown[index] += _show_new(command, len(shown[index]), final=not running)
            if not running:
                return max(abs(command.exit_code or 0) for command in commands)
            if time.monotonic() > deadline:
                raise MachineError(f"{running[0]} has not ended after {timeout:g} s")
            if dead := [machine.name for machine in pair if not machine.alive]:
                raise MachineError(f"{dead[0]} has ended{running[0].machine.last_words()}")
            time.sleep(POLL_SECONDS)


def _show_new(command: Command, already: int, final: bool) -> str:
    """Prints the lines that a command has finished since; returns what was printed of its output."""
    new = command.output[already:]
    if not final:
        new = new[: new.rfind("\n") + 1]
    for line in new.splitlines():
        print(f"[{command.machine.index}] {line}", flush=True)
    return new


if __name__ == "__main__":
    sys.exit(main())
