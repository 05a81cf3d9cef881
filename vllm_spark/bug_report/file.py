"""Writes a bug report: a text file of this user's that did not exist before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vllm_spark.bug_report.contents import Section
from vllm_spark.errors import ConfigurationError

_HEAD = """A report of vllm-spark for an issue. Secrets, credentials, home folders and public addresses were replaced.
Read it before you attach it: names of hosts, models and folders, and what clients sent if vLLM logs requests, stay.
"""


def write_report(path: Path, found: Sequence[Section]) -> None:
    """Writes the file, which its owner alone may read.

    Raises:
        ConfigurationError: it exists already, or cannot be written.
    """
    text = "\n".join([_HEAD, *(f"===== {each.title} =====\n{each.text}\n" for each in found)])
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigurationError(
            f"{path} exists already, and is not overwritten; give another file, or delete it"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{path} cannot be written ({reason}); give another file") from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigurationError(f"{path} cannot be written ({error.strerror}); give another file") from None
