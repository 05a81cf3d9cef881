"""Spans of one thread, with little work for each: a recorded step must not take much longer than another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from time import monotonic_ns
from types import TracebackType
from typing import Any

from vllm_spark.recording.parts import HOST_PARTS, OUTPUT, SCOPE_PREFIX, SCOPES
from vllm_spark.recording.records import Span


class SpanLog:
    """Keeps at most `capacity` spans."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._spans: list[tuple[int, int, int]] = []
        self.lost = 0

    @property
    def spans(self) -> list[Span]:
        """What was kept, in the order of their ends."""
        return [Span(*span) for span in self._spans]

    def timed(self, part: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator: each call of the function is a span."""
        number = HOST_PARTS.index(part)

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                start = monotonic_ns()
                try:
                    return function(*args, **kwargs)
                finally:
                    self.add(number, start, monotonic_ns())

            return call

        return decorate

    def scope(self, name: str) -> Scope:
        """The context of one of vLLM's scopes for profilers; only those of its model runner are spans."""
        part = SCOPES.get(name) or (OUTPUT if name.startswith(SCOPE_PREFIX) else None)
        return Scope(self, -1 if part is None else HOST_PARTS.index(part))

    def add(self, number: int, start: int, end: int) -> None:
        """Keeps a span, if there is room."""
        if len(self._spans) < self._capacity:
            self._spans.append((number, start, end))
        else:
            self.lost += 1


class Scope:
    """One span, as a context; part -1 is none."""

    __slots__ = ("_log", "_number", "_start")

    def __init__(self, log: SpanLog, number: int) -> None:
        self._log, self._number = log, number

    def __enter__(self) -> None:
        self._start = monotonic_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._number >= 0:
            self._log.add(self._number, self._start, monotonic_ns())
