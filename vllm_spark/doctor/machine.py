"""Checks of the host: locked and shared memory, IOMMU, processor clocks, memory and swap."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.rails import Rail, active
from vllm_spark.doctor.rdma import pinned_bytes
from vllm_spark.doctor.system import System

MB, GIB = 1_000_000, 1 << 30

_CAP_IPC_LOCK = 1 << 14
_LIMIT = re.compile(r"^Max locked memory\s+(\S+)", re.MULTILINE)
_SCALED_BY_FIRMWARE = ("intel_pstate", "amd-pstate-epp")
_CPUS = "sys/devices/system/cpu"


def check_machine(system: System, config: SparkConfig, rails: list[Rail]) -> Iterator[Finding]:
    """Runs the checks of this module."""
    if active(rails):
        yield _memlock(system, config, len(active(rails)))
        yield _iommu(system, active(rails))
    yield from _shared_memory(system)
    yield from _processor(system)
    yield from _memory(system)


def _memlock(system: System, config: SparkConfig, rails: int) -> Finding:
    title = "Limit of locked memory"
    found = _LIMIT.search(system.text("proc/self/limits") or "")
    if found is None:
        return Finding("machine.memlock", title, "unknown", "", "/proc/self/limits does not contain it.")
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", system.text("proc/self/status") or "", re.MULTILINE)
    exempt = capabilities is not None and int(capabilities[1], 16) & _CAP_IPC_LOCK
    value = "unlimited" if found[1] == "unlimited" else _size(int(found[1]))
    if exempt:
        return Finding("machine.memlock", title, "ok", f"{value}, does not apply to this user (CAP_IPC_LOCK)")
    if found[1] == "unlimited":
        return Finding("machine.memlock", title, "ok", value)
    try:
        needed = pinned_bytes(config, rails)
    except ImportError as error:
        detail = f"The memory that must be locked cannot be computed without the native module ({error})."
        return Finding("machine.memlock", title, "unknown", value, detail)
    if int(found[1]) >= needed:
        return Finding("machine.memlock", title, "ok", value)
    return Finding(
        "machine.memlock",
        title,
        "problem",
        value,
        f"Memory that the network card accesses is locked, once for each rail: {needed / MB:.0f} MB with "
        "these settings, which exceeds this limit.",
        'echo "$USER - memlock unlimited" | sudo tee /etc/security/limits.d/90-vllm-spark.conf   # then log in again\n'
        "In a systemd system unit: LimitMEMLOCK=infinity. In a container: docker run --ulimit memlock=-1 ...",
    )


def _size(count: int) -> str:
    return f"{count / MB:.1f} MB" if count >= MB else f"{count >> 10} KiB"


def _shared_memory(system: System) -> Iterator[Finding]:
    """A container has 64 MiB of it by default, and a machine half of its memory."""
    title = "Shared memory (/dev/shm)"
    mounts = [line.split() for line in (system.text("proc/mounts") or "").splitlines()]
    options = next((fields[3] for fields in reversed(mounts) if len(fields) > 3 and fields[1] == "/dev/shm"), None)
    if options is None:
        return
    found = re.search(r"(?:^|,)size=(\d+)([kmg]?)", options)
    size = int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30}[found[2]] if found else None
    if size is None or size >= GIB:
        yield Finding("machine.shm", title, "ok", "half of the memory" if size is None else f"{size / GIB:.1f} GiB")
        return
    yield Finding(
        "machine.shm",
        title,
        "warning",
        f"{size >> 20} MiB",
        "Processes of vLLM and torch exchange data there, such as images between the API server and the engine. When "
        "it is full, they are killed by SIGBUS.",
        "docker run --shm-size 8g ...   # or --ipc host\n"
        "sudo mount -o remount,size=8G /dev/shm   # on the machine itself, until the next boot",
    )


def _iommu(system: System, up: list[Rail]) -> Finding:
    title = "IOMMU"
    modes = {
        rail.name: system.text(f"sys/class/infiniband/{rail.device}/device/iommu_group/type") for rail in up if rail.pci
    }
    if not modes:
        return Finding("machine.iommu", title, "not applicable", "", "The rails are not PCI devices.")
    value = ", ".join(f"{name} {mode or 'off'}" for name, mode in modes.items())
    if all(mode in (None, "identity") for mode in modes.values()):
        return Finding("machine.iommu", title, "ok", value)
    return Finding(
        "machine.iommu",
        title,
        "note",
        value,
        "The IOMMU translates every memory access of the network card. Pass-through avoids that; its effect on a GB10 "
        "has not been published, so measure before and after.",
        "Add iommu.passthrough=1 to GRUB_CMDLINE_LINUX in /etc/default/grub, then: sudo update-grub, and restart.",
    )


def _processor(system: System) -> Iterator[Finding]:
    folders = system.glob(f"{_CPUS}/cpu[0-9]*/cpufreq")
    governors = {text for folder in folders if (text := system.text(f"{folder}/scaling_governor"))}
    drivers = {text for folder in folders if (text := system.text(f"{folder}/scaling_driver"))}
    title = "Processor governor"
    if not governors:
        yield Finding(
            "machine.governor", title, "not applicable", "", "The kernel does not set this machine's processor clocks."
        )
    elif governors == {"performance"}:
        yield Finding("machine.governor", title, "ok", "performance")
    else:
        slow = governors & {"powersave", "conservative"} and not drivers & set(_SCALED_BY_FIRMWARE)
        yield Finding(
            "machine.governor",
            title,
            "warning" if slow else "note",
            ", ".join(sorted(governors)),
            "The proxy thread posts every message, and the leader's thread starts every step. Raising a core's clock "
            "first adds latency" + (", and these cores stay at their lowest clock." if slow else "."),
            "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor   # until the next boot",
        )
    clocks = sorted({clock for folder in folders if (clock := _clock(system, folder))})
    if clocks:
        capped = any(limit < 0.95 * most for limit, most in clocks)
        value = ", ".join(f"{limit / 1e6:.2f} of {most / 1e6:.2f} GHz" for limit, most in clocks)
        yield Finding(
            "machine.clocks",
            "Highest processor clock allowed",
            "warning" if capped else "ok",
            value,
            "A setting or a power profile limits the cores below their maximum." if capped else "",
            "sudo cpupower frequency-set --max 10GHz   # no limit but the processor's own\n"
            "powerprofilesctl set performance"
            if capped
            else "",
        )


def _clock(system: System, folder: str) -> tuple[int, int] | None:
    """A core's clock limit and its maximum, in kHz."""
    limit, most = (system.text(f"{folder}/{name}_max_freq") for name in ("scaling", "cpuinfo"))
    return (int(limit), int(most)) if limit and most and limit.isdecimal() and most.isdecimal() else None


def _memory(system: System) -> Iterator[Finding]:
    table = {
        name: int(words[0]) << 10
        for name, _, rest in (line.partition(":") for line in (system.text("proc/meminfo") or "").splitlines())
        if (words := rest.split()) and words[0].isdecimal()
    }
    total, available = table.get("MemTotal", 0), table.get("MemAvailable", 0)
    if not total:
        yield Finding("machine.memory", "Free memory", "unknown", "", "/proc/meminfo does not contain it.")
        return
    yield _free_memory(total, available, table.get("Cached", 0) + table.get("Buffers", 0))
    swap = table.get("SwapTotal", 0)
    used = swap - table.get("SwapFree", 0)
    busy = used > GIB
    yield Finding(
        "machine.swap",
        "Swap",
        "warning" if busy else "ok",
        f"{used / GIB:.1f} of {swap / GIB:.1f} GiB used" if swap else "none",
        "Parts of programs are on disk. With 1.3 GiB of a rank in swap a pair of GB10 made 52 in place of 67 tokens "
        "per second (sfxnz/GLM-5.3-Flash-NVFP4-vLLM-2x-DGX-Spark, README). The GPU shares this memory: when it runs "
        "out, a machine with swap stops responding, where one without swap kills a program."
        if busy
        else "",
        "sudo swapoff -a && sudo swapon -a   # reads them back, if there is enough memory" if busy else "",
    )


def _free_memory(total: int, available: int, cached: int) -> Finding:
    title = "Free memory"
    value = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available, {cached / GIB:.1f} of it file cache"
    if available < total / 2:
        return Finding(
            "machine.memory",
            title,
            "warning",
            value,
            "On a GB10 the GPU uses the same memory, and more than half is in use.",
            "ps -eo rss,pid,args --sort=-rss | head   # the largest processes, in KiB",
        )
    if cached > total / 4:
        return Finding(
            "machine.memory",
            title,
            "note",
            value,
            "On unified memory some versions of vLLM count the file cache as used, and may refuse to start although "
            "the kernel would free it (vllm issue 35313).",
            "sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches'   # right before the start",
        )
    return Finding("machine.memory", title, "ok", value)
