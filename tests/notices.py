"""What could not be tested on this machine: sections at the end of the test run, also of what a worker found out."""

from __future__ import annotations

from typing import Any

import pytest

_NOTICES = pytest.StashKey[dict[str, str]]()
_KEY = "notices"
"""In what a worker of pytest-xdist hands over at its end."""


def add(config: pytest.Config, title: str, text: str) -> None:
    """Has the end of the test run show this text in a section of its own. A title that is there already is replaced."""
    config.stash.setdefault(_NOTICES, {})[title] = text


def hand_over(config: pytest.Config) -> None:
    """At the end of a worker: gives its notices to the process that prints the summary. Else does nothing."""
    output: dict[str, Any] | None = getattr(config, "workeroutput", None)
    if output is not None:
        output[_KEY] = config.stash.get(_NOTICES, {})


def take_over(config: pytest.Config, node: object) -> None:
    """In the process that prints the summary: takes the notices of a worker that has ended; a killed one has none."""
    for title, text in getattr(node, "workeroutput", {}).get(_KEY, {}).items():
        add(config, title, text)


def show(reporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the sections."""
    for title, text in sorted(config.stash.get(_NOTICES, {}).items()):
        reporter.section(title, yellow=True)
        reporter.line(text)
