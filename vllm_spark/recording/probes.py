"""Replaces functions of running objects by recording ones, and puts them back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT: Any = object()

Function = Callable[..., Any]


class Probes:
    """The functions that one recording has replaced. For one thread."""

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> bool:
        """Replaces the attribute `name` of an object, class or module by `make(present value)`.

        Returns:
            False if `owner` has no such attribute: another version of vLLM. Then the trace lacks this part.
        """
        present = getattr(owner, name, _ABSENT)
        if present is _ABSENT:
            return False
        own = vars(owner).get(name, _ABSENT)  # not what its class has
        replacement = make(present)
        setattr(owner, name, replacement)
        self._replaced.append((owner, name, own, replacement))
        return True

    def restore(self) -> None:
        """Puts everything back, the last first; what something else has replaced since stays."""
        while self._replaced:
            owner, name, own, replacement = self._replaced.pop()
            if vars(owner).get(name, _ABSENT) is not replacement:
                continue
            if own is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
