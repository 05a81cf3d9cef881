"""Whether the kernel keeps memory reserved for kexec handover (KHO), from where a network card cannot use it.

The reserved memory stays in use for pages that can be moved away again. Registering memory with the network card must
move such a page first, and cannot while the GPU's driver holds it: registration then fails for lack of memory, on a
machine that has plenty. The same rule stands in csrc/transport/verbs/pin_remedy.cpp, for the error.
"""

from __future__ import annotations

import re

from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.system import System

_TITLE = "Memory reserved for kexec handover"
_FALSE = re.compile("[nNfF0]|[oO][fF]")
"""How the kernel's false values begin."""


def check_handover(system: System) -> Finding:
    """For a GB10, whose kernel reserves several GiB."""
    options = re.findall(r"(?:^|\s)kho=(\S*)", system.text("proc/cmdline") or "")
    if options and _FALSE.match(options[-1]):
        return Finding("machine.handover", _TITLE, "ok", f"none (kho={options[-1]})")
    free, total = _kib(system, "CmaFree"), _kib(system, "CmaTotal")
    # Where free memory of this kind is counted the reserved memory counts, and in the total it does not.
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
        "Once the file cache has filled the rest, memory that both the network card and the GPU use comes from there, "
        "and the card cannot register what the GPU's driver holds already: it fails with ENOMEM.",
        "Add kho=off to GRUB_CMDLINE_LINUX in /etc/default/grub, then: sudo update-grub, and restart.",
    )


def _kib(system: System, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", system.text("proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) if found else 0


def _reserved_by_default(system: System) -> bool:
    release = system.text("proc/sys/kernel/osrelease") or ""
    config = system.text(f"boot/config-{release}") or ""
    return "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y" in config.splitlines()
