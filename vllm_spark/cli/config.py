"""`vllm-spark config`: the reference of all settings, as text or as the page docs/configuration.md."""

from __future__ import annotations

import argparse

from vllm_spark.config.settings import ENABLE_VARIABLE, SECRET_VARIABLE, SparkConfig, serve_flag, side_of
from vllm_spark.variables import variable_name

SUMMARY = "print the reference of all settings"

_PREFACE = f"""# Settings

Made from `vllm_spark/config/settings.py` by `vllm-spark config`.

A setting's value comes from, strongest first: a flag, the environment, a file (vLLM's `--config` YAML),
`additional_config={{"spark": {{...}}}}` in `LLM(...)` or on the command line, the default. `--spark` itself may also be
given as `{ENABLE_VARIABLE}=1` or, in the YAML file, `spark: true`. `LLM(...)` runs on the pair if `additional_config`
has the key `"spark"` (`{{}}` for the defaults), or with `{ENABLE_VARIABLE}=1`. The secret may stand in
`{SECRET_VARIABLE}` instead of a file.

The leader's settings are sent to the follower. `vllm-spark join` takes the settings of the sides *follower* and
*both*, with flags without the prefix `spark-`.

| flag | variable | side | default | meaning |
| --- | --- | --- | --- | --- |
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints the reference."""
    print(reference(), end="")
    return 0


def reference() -> str:
    """The page, as Markdown."""
    return _PREFACE + "".join(_row(name) for name in SparkConfig.model_fields)


def _row(name: str) -> str:
    field = SparkConfig.model_fields[name]
    side = side_of(name)
    flag = f"`--{name.replace('_', '-')}` (join)" if side == "follower" else f"`{serve_flag(name)}`"
    default = "" if field.default is None else f"`{field.default}`"
    return f"| {flag} | `{variable_name(name)}` | {side} | {default} | {field.description} |\n"
