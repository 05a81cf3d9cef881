"""`--spark` on vLLM's command line: the way of the settings into vLLM's engine arguments.

Patches of vLLM call this module, in this order: `add_option_group` when a parser is made, `run_serve` for `vllm serve`,
`create_engine_arguments` and `create_configuration`. The settings are resolved in the first of the last three, and
then stay in `additional_config["spark"]`, which vLLM itself copies from one object to the next. Each calls
`vllm_spark.entrypoints.serve` if a pair is requested, and else vLLM's own function. vLLM imports this module also
without `--spark`, so it must stay small.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
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
    check_config_file(parser, sys.argv, requested=_is_requested_before_parsing(parser))
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


def run_serve(args: Any, original: Callable[[], Any]) -> Any:
    """`vllm serve`: with `--spark` as leader, or as follower if a launcher made this process rank 1.

    Args:
        args: the parsed command line.
        original: vLLM's command.
    """
    if not _mentions_spark(args):
        return original()
    from vllm_spark.entrypoints.serve import exit_with_sentence, serve

    with exit_with_sentence(args):
        config = request_pair(args)
        if config is not None:
            return serve(config, args, original)
    return original()


def create_engine_arguments(args: Any, create: Callable[[], Any]) -> Any:
    """Creates vLLM's engine arguments from a parsed command line, with the settings of a pair in them.

    Args:
        args: the parsed command line.
        create: creates vLLM's engine arguments from it.

    Raises:
        ConfigurationError: an invalid setting, or arguments that vLLM rejects.
    """
    if request_pair(args) is None:
        return create()
    from vllm_spark.entrypoints.serve import create_leading_arguments

    return create_leading_arguments(args, create)


def create_configuration(engine_args: Any, create: Callable[[], Any]) -> Any:
    """Creates vLLM's configuration: that of a pair if the engine arguments or the environment request one.

    Args:
        engine_args: vLLM's; of a command line, or of an `LLM(...)` in the user's program.
        create: creates vLLM's configuration from them.

    Raises:
        ConfigurationError: an invalid setting, or an option that a pair does not support.
    """
    section = (engine_args.additional_config or {}).get(SECTION)
    if section is None and not enabled_by_environment():
        return create()
    from vllm_spark.entrypoints.serve import configure

    return configure(engine_args, _resolved(section), create)


def request_pair(args: Any) -> SparkConfig | None:
    """Resolves the settings of a parsed command line, and puts them into its `additional_config`.

    Returns:
        The settings, in a second call those of the first; None without `--spark`.

    Raises:
        ConfigurationError: an invalid or contradictory setting.
    """
    additional = getattr(args, "additional_config", None) or {}
    section = additional.get(SECTION)
    if isinstance(section, SparkConfig):
        return section
    config = _settings_of(args, section)
    if config is not None:
        args.additional_config = {**additional, SECTION: config}
    return config


def _settings_of(args: Any, section: Any) -> SparkConfig | None:
    """The settings of a parsed command line, the environment and vLLM's `--config` file; None without `--spark`.

    Args:
        args: the parsed command line.
        section: what `--additional-config` has for `spark`: it requests a pair too; every other way to give a setting
            has precedence over it.
    """
    given = given_flags(args)
    if section is None and not (getattr(args, "spark", None) or enabled_by_environment()):
        if given:
            name = next(iter(given)).replace("_", "-")
            raise ConfigurationError(f"{FLAG}-{name} was given without {FLAG}; add {FLAG}, or leave it out")
        return None
    # vLLM merges its --config file into the command line. Options that were not typed came from the file, and the
    # environment has precedence over them.
    typed = typed_flags(sys.argv) if any(word.startswith("--config") for word in sys.argv) else given.keys()
    return SparkConfig.resolve(
        flags={name: value for name, value in given.items() if name in typed},
        file={**_checked(section), **{name: value for name, value in given.items() if name not in typed}},
    )


def _resolved(section: Any) -> SparkConfig:
    """The settings in `additional_config["spark"]`: resolved already, or a dictionary of the user's program."""
    return section if isinstance(section, SparkConfig) else SparkConfig.resolve(file=_checked(section))


def _checked(section: Any) -> dict[str, Any]:
    """The settings that a user wrote into `additional_config["spark"]`."""
    if not isinstance(section, dict | None):
        raise ConfigurationError(
            f"additional_config['spark'] is {section!r}; give a dictionary of settings, or {{}} for the defaults"
        )
    return section or {}


def _mentions_spark(args: Any) -> bool:
    """Whether a parsed command line or the environment requests a pair or has one of its options, valid or not."""
    return (
        any(name == "spark" or name.startswith("spark_") for name in vars(args))
        or SECTION in (getattr(args, "additional_config", None) or {})
        or _is_set_in_environment()
    )


def check_config_file(parser: Any, argv: Sequence[str], *, requested: bool) -> None:
    """Exits with a usage error if a `--config` file is given that cannot be read, or in which `spark` is no boolean.

    vLLM reads the file while it parses the command line, and would end with a traceback. It passes `spark: maybe` on as
    `--spark maybe`, which starts a pair.

    Args:
        parser: the parser, for its error.
        argv: the command line.
        requested: whether the command line or the environment requests a pair; else the file is only searched for
            `spark`, and vLLM reports its other problems.
    """
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == "--config":
            content, problem = _read_config_file(Path(value if equals else following))
            if problem is None:
                problem = _switch_problem(value if equals else following, content)
            elif not requested:
                problem = None
            if problem:
                parser.error(problem)


def _switch_problem(path: str, content: dict[Any, Any]) -> str | None:
    """Why the value of `spark` in the file at `path` is not valid, in a sentence; None if it is, or is absent."""
    name = FLAG.removeprefix("--")
    value = content.get(name, False)
    if isinstance(value, bool):
        return None
    return (
        f"--config {path} has {value!r} for {name}, which is neither true nor false; write `{name}: true` to serve on "
        "a pair, or leave it out"
    )


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


def _read_config_file(path: Path) -> tuple[dict[Any, Any], str | None]:
    """The options in vLLM's `--config` file at `path`, and why it is not valid, in a sentence; None if it is."""
    import yaml  # not loaded without `--spark`

    from vllm_spark.files import TABLE_FILE, read_regular  # not in a process without --spark

    try:
        content = yaml.safe_load(read_regular(path, TABLE_FILE).decode())
    except (OSError, UnicodeDecodeError) as error:
        return {}, f"--config {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}"
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        problem = getattr(error, "problem", None) or "it does not parse"
        return {}, f"--config {path} is not valid YAML, see its line {line}: {problem}"
    if path.suffix not in (".yaml", ".yml"):
        return {}, f"--config {path} must be named *.yaml or *.yml"
    if not isinstance(content, dict):
        return {}, f"--config {path} has no options; write one on each line, as `{FLAG.removeprefix('--')}: true`"
    return content, None
