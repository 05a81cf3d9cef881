"""`--spark` and its options on vLLM's command line, and in its engine arguments.

`add_option_group` adds the flags, `settings_of_command_line` and `section_of` read the settings, `check_config_file`
checks vLLM's `--config` file. vLLM imports this module also without `--spark`, so it must stay small.
"""

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
    """Adds `--spark` and its options to one of vLLM's parsers, in the group of `--help=Spark`."""
    if _is_requested_before_parsing(parser):
        check_config_file(parser, sys.argv)
    group = parser.add_argument_group(
        title="Spark", description="Serve one model on a pair of machines (the other one runs: vllm-spark join)."
    )
    group.add_argument(
        FLAG,
        action="store_true",
        default=argparse.SUPPRESS,
        help="Serve the model on this machine and its follower together.",
    )
    add_flags(group, ["leader", "both"])


def asks_for_spark(args: Any) -> bool:
    """Whether a parsed command line or the environment has `--spark` or one of its options, valid or not."""
    return any(name == "spark" or name.startswith("spark_") for name in vars(args)) or _is_set_in_environment()


def settings_of_command_line(args: Any) -> SparkConfig | None:
    """The settings of a parsed command line and the environment; None without `--spark`.

    Raises:
        ConfigurationError: an invalid or contradictory setting.
    """
    given = given_flags(args)
    if not (getattr(args, "spark", None) or enabled_by_environment()):
        if given:
            name = next(iter(given)).replace("_", "-")
            raise ConfigurationError(f"{FLAG}-{name} was given without {FLAG}; add {FLAG}, or leave it out")
        return None
    # vLLM merges its --config file into the command line. Options that were not typed came from the file, and the
    # environment has precedence over them.
    typed = typed_flags(sys.argv) if any(word.startswith("--config") for word in sys.argv) else given.keys()
    return SparkConfig.resolve(
        flags={name: value for name, value in given.items() if name in typed},
        file={name: value for name, value in given.items() if name not in typed},
    )


def section_of(engine_args: Any) -> Any:
    """The settings in vLLM's engine arguments; None if they do not request a pair.

    Raises:
        ConfigurationError: VLLMSPARK_ENABLE is neither yes nor no.
    """
    section = (engine_args.additional_config or {}).get(SECTION)
    if section is None and enabled_by_environment():
        return {}  # an LLM(...) in the user's program; a command line has been read before
    return section


def check_config_file(parser: Any, argv: Sequence[str]) -> None:
    """Exits with a usage error if a `--config` file is given that cannot be read.

    vLLM reads the file while it parses the command line, and would end with a traceback.
    """
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--config":
            problem = _config_file_problem(Path(value if equals else following))
            if problem:
                parser.error(problem)


def _is_requested_before_parsing(parser: Any) -> bool:
    try:
        return FLAG in sys.argv or enabled_by_environment()
    except ConfigurationError as error:
        parser.error(str(error))
        raise


def _is_set_in_environment() -> bool:
    try:
        return enabled_by_environment()
    except ConfigurationError:
        return True


def _config_file_problem(path: Path) -> str | None:
    """Why the file at `path` is not valid as vLLM's `--config`, in a sentence; None if it is."""
    import yaml  # not loaded without `--spark`

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
        return f"--config {path} has no options; write one on each line, as `{FLAG.removeprefix('--')}: true`"
    return None
