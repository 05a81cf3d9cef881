"""The names of this project's environment variables: each begins with `PREFIX`.

`variable_name` makes the name of a setting's variable, `internal_name` that of a variable between processes of this
project, and `find_variable` reads a setting's variable. This release also reads the settings' old names, which begin
with `OLD_PREFIX`: Apache Spark and Kubernetes use names with that prefix too (docs/decisions.md).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from vllm_spark.errors import ConfigurationError

PREFIX = "VLLMSPARK_"
OLD_PREFIX = "SPARK_"

_SIMILAR_PREFIX = re.compile(r"(?:VLLM_?)?SPARK_")
_SIMILARITY = 0.85
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
"""Matches a value that Kubernetes sets for a Service: SPARK_PORT=tcp://10.0.0.1:7077 for one named `spark`."""


class Variable(NamedTuple):
    """A variable that is set, under its present or its old name."""

    name: str
    value: str


def variable_name(name: str) -> str:
    """`heartbeat_timeout` -> `VLLMSPARK_HEARTBEAT_TIMEOUT`."""
    return PREFIX + name.upper()


def internal_name(name: str) -> str:
    """The name of a variable by which a process of this project passes something to its children."""
    return "_" + variable_name(name)


def old_name(name: str) -> str:
    """The old name of a variable: `VLLMSPARK_PORT` -> `SPARK_PORT`."""
    return OLD_PREFIX + name.removeprefix(PREFIX)


def find_variable(name: str, environment: Mapping[str, str] | None = None) -> Variable | None:
    """The variable `name` of a setting, or the one with its old name; None if neither is set, or only to nothing.

    Raises:
        ConfigurationError: both are set, to different values.
    """
    environment = os.environ if environment is None else environment
    value, old = environment.get(name, ""), _old_variable(name, environment)
    if old is None or old.value == value:
        return Variable(name, value) if value else None
    if value:
        raise ConfigurationError(
            f"{name} and {old.name}, its old name, have different values; set {name}, and unset {old.name}"
        )
    return old


def variable_warnings(names: Collection[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Whole sentences about old names in use, and about variables that look like one of `names` and are not read.

    Other software uses variables with the old prefix, so only similar names are reported.
    """
    environment = os.environ if environment is None else environment
    old = [(variable.name, name) for name in names if (variable := _old_variable(name, environment))]
    sentences = []
    if renamed := [f"{before} to {now}" for before, now in old if not environment.get(now)]:
        sentences.append(
            f"Variables have their old names, which the next release will not read; rename {', '.join(renamed)}."
        )
    known = {old_name(name) for name in names}
    for name, value in environment.items():
        prefix = _SIMILAR_PREFIX.match(name)
        if prefix is None or name in names or name in known or _SERVICE_ADDRESS.match(value):
            continue
        # Compared with the short prefix: with a long one, all names would be similar.
        near = difflib.get_close_matches(OLD_PREFIX + name[prefix.end() :], known, n=1, cutoff=_SIMILARITY)
        if near:
            meant = PREFIX + near[0].removeprefix(OLD_PREFIX)
            sentences.append(f"The variable {name} is not read; did you mean {meant}?")
    return sentences


def _old_variable(name: str, environment: Mapping[str, str]) -> Variable | None:
    before = old_name(name)
    value = environment.get(before, "")
    return Variable(before, value) if value and not _SERVICE_ADDRESS.match(value) else None
