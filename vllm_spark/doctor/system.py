"""The machine as its kernel shows it in files, below a root folder: `/`, or a copy of another machine's."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PROGRAM_SECONDS = 20.0
"""How long a program that is asked may take: a GPU's driver that was asleep takes seconds."""


class System:
    """Files and programs below `root`. Paths are given without the leading slash, as in `sys/class/net`."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    @property
    def live(self) -> bool:
        """True if this is the running machine, and not a copy of its files."""
        return self.root == Path("/")

    def text(self, path: str) -> str | None:
        """The content of a file without the white space around it; None if it cannot be read."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except (OSError, ValueError):  # an attribute of the kernel may refuse to be read
            return None

    def entries(self, path: str) -> list[str]:
        """The names in a folder, in order; none if there is no such folder."""
        try:
            return sorted(os.listdir(self.root / path))
        except OSError:
            return []

    def glob(self, pattern: str) -> list[str]:
        """The paths that match, in order."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob(pattern))

    def target(self, path: str) -> str | None:
        """The last part of what a symbolic link points to; None if it is none."""
        try:
            return os.path.basename(os.readlink(self.root / path))
        except OSError:
            return None

    def accessible(self, path: str) -> bool:
        """True if this user may read and write the file."""
        return os.access(self.root / path, os.R_OK | os.W_OK)

    def run(self, program: str, *arguments: str) -> tuple[int, str] | None:
        """Runs a program for at most `PROGRAM_SECONDS`.

        Returns:
            Its exit code and what it printed; None if it is not installed, or did not end in time.
        """
        path = shutil.which(program) if self.live else shutil.which(program, path=str(self.root / "usr/bin"))
        if path is None:
            return None
        try:
            done = subprocess.run(
                [path, *arguments],
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=PROGRAM_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.returncode, done.stdout.decode(errors="replace").strip()
