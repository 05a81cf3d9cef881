"""vLLM's `--config` file, looked at before vLLM reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_spark.config import FLAG


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
