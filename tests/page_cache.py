"""What the kernel's page cache has of files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest


def cached(files: Sequence[Path]) -> int:
    """Bytes of the files that are in the page cache; skips the test without util-linux's `fincore`."""
    if shutil.which("fincore") is None:
        pytest.skip("needs the program fincore (Debian package util-linux-extra)")
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return sum(int(line) for line in done.stdout.split())
