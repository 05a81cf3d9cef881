"""`--spark` and its options on vLLM's command line: all that a vLLM without `--spark` loads of this project."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_spark.config.settings import (
    FLAG,
    SECTION,
    SparkConfig,
    add_flags,
    enabled_by_environment,
    given_flags,
    typed_flags,
)
from vllm_spark.errors import ConfigurationError


def add_option_group(parser: Any) -> None:
    """Adds `--spark` and its options to one of vLLM's parsers, in a group that `--help=Spark` shows."""
    if _asked_for_before_parsing(parser):
        check_config_file(parser, sys.argv)
    group = parser.add_argument_group(
        title="Spark", description="Serve one model on a pair of machines (the other one runs: vllm-spark join)."
    )
    group.add_argument(
        FLAG, action="store_true", default=argparse.SUPPRESS, help="Serve on this machine and its follower together."
    )
    add_flags(group, ["leader", "both"])


def asks_for_spark(args: Any) -> bool:
    """Whether a parsed command line or the environment has anything of `--spark`, right or wrong."""
    return any(name == "spark" or name.startswith("spark_") for name in vars(args)) or _environment_says_something()


def settings_of_command_line(args: Any) -> SparkConfig | None:
    """The settings that a parsed command line and the environment give; None without `--spark`.

    Raises:
        ConfigurationError: a bad or contradictory setting.
    """
    given = given_flags(args)
    if not (getattr(args, "spark", None) or enabled_by_environment()):
        if given:
            name = next(iter(given)).replace("_", "-")
            raise ConfigurationError(f"{FLAG}-{name} was given without {FLAG}; add {FLAG}, or leave it out")
        return None
    # vLLM merges its --config file into the command line. What was not typed came from there, and yields to
    # the environment.
    typed = typed_flags(sys.argv) if any(word.startswith("--config") for word in sys.argv) else given.keys()
    return SparkConfig.resolve(
        flags={name: value for name, value in given.items() if name in typed},
        file={name: value for name, value in given.items() if name not in typed},
    )


def section_of(engine_args: Any) -> Any:
    """What vLLM's engine arguments have of settings; None if they do not ask for a pair.

    Raises:
        ConfigurationError: the environment holds something that is neither yes nor no.
    """
    section = (engine_args.additional_config or {}).get(SECTION)
    if section is None and enabled_by_environment():
        return {}  # an LLM(...) of the user's own; a command line has been read before
    return section


def _asked_for_before_parsing(parser: Any) -> bool:
    try:
        return FLAG in sys.argv or enabled_by_environment()
    except ConfigurationError as error:
        parser.error(str(error))
        raise


def _environment_says_something() -> bool:
    try:
        return enabled_by_environment()
    except ConfigurationError:
        return True


def check_config_file(parser: Any, argv: Sequence[str]) -> None:
    """Ends in a usage error if a `--config` file is given that cannot be read.

    vLLM reads the file while it parses the command line, and ends with a traceback.
    """
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--config":
            problem = _unreadable(Path(value if equals else following))
            if problem:
                parser.error(problem)


def _unreadable(path: Path) -> str | None:
    """Why the file at `path` cannot serve as vLLM's `--config`, in a sentence; None if it can."""
    import yaml  # a vLLM without `--spark` need not load it

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        return f"--config {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}"
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = getattr(error, "problem", None) or "it does not parse"
        return f"--config {path} is not valid YAML, see its line {line}: {problem}"
    if path.suffix not in (".yaml", ".yml"):
        return f"--config {path} must be named *.yaml or *.yml"
    if not isinstance(content, dict):
        return f"--config {path} holds no options; write one on each line, as `{FLAG.removeprefix('--')}: true`"
    return None
