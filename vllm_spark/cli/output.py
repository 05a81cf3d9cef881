"""Where figures of the benchmarks and the tuner go."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console

from vllm_spark.errors import ConfigurationError

_FILE_WIDTH = 120  # columns, where the output is no terminal


def wide_console() -> Console:
    """The terminal, or a file wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)


def check_writable(path: Path) -> None:
    """Raises ConfigurationError if `path` cannot be written, before anything has been measured."""
    if not os.access(path.resolve().parent, os.W_OK):
        raise ConfigurationError(f"{path} cannot be written: {path.resolve().parent} is no folder that takes files")
    if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigurationError(f"{path} cannot be written: it is a folder, or protected; give another file")
