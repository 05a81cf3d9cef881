"""What tells one machine from another, and one that was restarted from itself."""

from __future__ import annotations

import os
from pathlib import Path


def machine_identity() -> str:
    """A random number that the kernel draws at boot, and the process namespace: two processes that have both in common
    can reach each other's memory."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
