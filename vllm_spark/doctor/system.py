"""Access to a machine's files and programs below a root folder: `/`, or a copy of another machine's files.

`check_handover`, a check of one kernel option, is here as well.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from vllm_spark.doctor.finding import Finding

PROGRAM_SECONDS = 20.0
"""Time limit of an external program: a GPU's driver may take seconds to wake up."""

_TITLE = "Memory reserved for kexec handover"

_FALSE = re.compile("[nNfF0]|[oO][fF]")
"""Start of values that the kernel parses as false."""


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
        except (OSError, ValueError):  # reading a kernel attribute may fail
            return None

    def entries(self, path: str) -> list[str]:
        """The sorted names in a folder; empty if there is no such folder."""
        try:
            return sorted(os.listdir(self.root / path))
        except OSError:
            return []

    def glob(self, pattern: str) -> list[str]:
        """The sorted paths that match."""
        return sorted(str(path.relative_to(self.root)) for path in self.root.glob(pattern))

    def target(self, path: str) -> str | None:
        """The last part of a symbolic link's target; None if it is not a link."""
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


def check_handover(system: System) -> Finding:
    """Whether the kernel reserves memory for kexec handover: several GiB on a GB10."""
    options = re.findall(r"(?:^|\s)kho=(\S*)", system.text("proc/cmdline") or "")
    if options and _FALSE.match(options[-1]):
        return Finding("machine.handover", _TITLE, "ok", f"none (kho={options[-1]})")
    free, total = _kib(system, "CmaFree"), _kib(system, "CmaTotal")
    # The reserved memory is counted in CmaFree, and not in CmaTotal.
    evidence = (
        f"kho={options[-1]} on the kernel's command line"
        if options and options[-1]
        else f"CmaFree of {free / (1 << 20):.1f} GiB is more than CmaTotal of {total / (1 << 20):.1f} GiB"
        if free > total
        else "this kernel reserves it by default"
        if _reserved_by_default(system)
        else ""
    )
    if not evidence:
        return Finding("machine.handover", _TITLE, "ok", "none")
    return Finding(
        "machine.handover",
        _TITLE,
        "warning",
        evidence,
        "Once the file cache has filled the other memory, memory that the network card and the GPU share is allocated "
        "there, and registering it with the card fails with ENOMEM, since the GPU's driver has pinned it.",
        "Add kho=off to GRUB_CMDLINE_LINUX in /etc/default/grub, then: sudo update-grub, and restart.",
    )


def _kib(system: System, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", system.text("proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) if found else 0


def _reserved_by_default(system: System) -> bool:
    release = system.text("proc/sys/kernel/osrelease") or ""
    config = system.text(f"boot/config-{release}") or ""
    return "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y" in config.splitlines()
