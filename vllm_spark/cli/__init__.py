"""The command `vllm-spark`: one module per subcommand, imported only when it is used."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from vllm_spark import __version__
from vllm_spark.errors import EXIT_USAGE, SparkError

PROGRAM = "vllm-spark"
COMMANDS = ("doctor", "demo", "join", "status", "trace", "report", "bench", "tune", "estimate", "patches", "config")
"""Every subcommand, in the order of the help page; each is the module of that name in this package."""

EXIT_INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, what a shell reports for a program that the signal ended."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of writing to standard output, if it is a file."""


class Command(Protocol):
    """The interface of a subcommand's module."""

    SUMMARY: str
    """One line for the help page."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options of this subcommand."""

    def run(self, args: argparse.Namespace) -> int:
        """Runs the command and returns the exit code; raises SparkError for errors that a message explains."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vllm-spark ARGV` and returns its exit code; nothing is raised to the caller.

    Exit codes: 0 done, 2 wrong usage, 130 interrupted by Ctrl-C, else the `exit_code` of the SparkError that
    ended it, whose message is all that is printed of it.
    """
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except SystemExit as end:  # argparse: --help, or a usage error that it has already explained
        return end.code if isinstance(end.code, int) else EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except SparkError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader closed the pipe (`vllm-spark config | head`). Python would raise again when it flushes at exit.
        _give_up_output()
        return 0
    except OSError as error:
        if error.errno not in _NO_ROOM or error.filename is not None:
            raise
        _give_up_output()
        return _fail(
            f"the output cannot be written ({error.strerror}); free disk space, or write it elsewhere",
            SparkError.exit_code,
        )


def _give_up_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str]) -> int:
    if not words:
        print(_help(), end="\n\n")
        return _fail(f"a command is missing; the commands are {', '.join(COMMANDS)}", EXIT_USAGE)
    name = words[0]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        near = difflib.get_close_matches(name, (*COMMANDS, "--help", "--version"), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}."
        return _fail(f"there is no {kind} {name!r}; {hint}", EXIT_USAGE)
    command = _load(name)
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=command.SUMMARY, allow_abbrev=False)
    command.add_arguments(parser)
    from vllm_spark.config.settings import flags_named

    with flags_named("--"):  # the settings' flags as this command has them
        args, unknown = parser.parse_known_args(words[1:])
        if unknown:
            getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
        return command.run(args)


def _load(name: str) -> Command:
    return cast("Command", importlib.import_module(f"{__name__}.{name}"))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {_load(name).SUMMARY}" for name in COMMANDS]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [OPTION...]",
            "",
            "Serve one vLLM model on a pair of GB10 machines.",
            "",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` shows the options of a command, `{PROGRAM} --version` the version.",
            "The model itself is served by `vllm serve MODEL --spark`.",
        ]
    )


def _fail(sentence: str, exit_code: int) -> int:
    end = "" if sentence.endswith((".", "?", "!")) else "."
    print(f"{PROGRAM}: {sentence}{end}", file=sys.stderr)
    return exit_code
