"""Pickles that the other machine can load.

A class or function that the other machine cannot import (from the user's script, or a model's remote code) is pickled
by value. An error names the part that cannot be pickled: its path within the value, and its type.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle

from vllm_spark.errors import ConfigurationError, SparkError, first_line

_DEEPEST = 6
"""Levels of attributes and items that are searched for the part that cannot be pickled."""


def dumps_by_value(value: Any) -> bytes:
    """`value` pickled so that a process without this one's scripts and downloaded code can load it.

    Raises:
        whatever pickling raises: most often TypeError or pickle.PicklingError.
    """
    _register_remote_code()
    return bytes(cloudpickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


def dumps_configuration(configuration: Any, name: str) -> bytes:
    """`configuration` pickled by value.

    Args:
        configuration: an object with attributes.
        name: how to call it in an error.

    Raises:
        ConfigurationError: a part of it cannot be pickled; the sentence names that part.
    """
    try:
        return dumps_by_value(configuration)
    except Exception as error:
        path, part = _unpicklable_part(configuration)
        raise ConfigurationError(
            f"{'.'.join((name, *path))} is {_described(part)}, which cannot be sent to the follower "
            f"({first_line(error)}); give a value that can be pickled"
        ) from error


def loads_configuration(payload: bytes) -> Any:
    """The configuration that an authenticated peer pickled with `dumps_configuration`.

    Raises:
        SparkError: it needs a module, or a name in one, that this machine does not have.
    """
    try:
        return pickle.loads(payload)
    except (ImportError, AttributeError) as error:
        raise SparkError(
            f"the leader's configuration needs a module that cannot be imported here ({first_line(error)}); install "
            "it on this machine too, or name its folder in PYTHONPATH here"
        ) from error


def _register_remote_code() -> None:
    """Has cloudpickle pickle classes of a model's own code (trust_remote_code) by value.

    vLLM does so in the processes that read such a model's configuration, but not in its engine's.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        cloudpickle.register_pickle_by_value(sys.modules[name])


def _unpicklable_part(value: Any) -> tuple[list[str], Any]:
    """The path from `value` to the innermost part that cannot be pickled, and that part."""
    path: list[str] = []
    while len(path) < _DEEPEST:
        found = next(((name, part) for name, part in _parts(value) if not _can_be_pickled(part)), None)
        if found is None:
            break
        path.append(found[0])
        value = found[1]
    return path, value


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), part) for index, part in enumerate(value))
    elif not isinstance(value, type):
        yield from getattr(value, "__dict__", {}).items()


def _can_be_pickled(value: Any) -> bool:
    try:
        dumps_by_value(value)
    except Exception:  # whatever a part's own methods raise: `dumps_configuration` reports the first error
        return False
    return True


def _described(value: Any) -> str:
    kind = type(value)
    return f"of the type {kind.__module__}.{kind.__qualname__}".replace("builtins.", "")
