"""Memory that both a NIC and the GPU use: who pins it first, and what is said where it cannot be pinned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .programs import CHECKED, Programs, without_preload

BOUND = 300

PROGRAM = """
import sys
from vllm_spark import _native

def make(rank):
    options = _native.Options(rank=rank, proxied=True, timeout_s=30.0, slot_bytes=1 << 16, packet_bytes=1 << 12,
        depth=2, stripes=1, first_sequence=1, largest_message=1 << 26)
    shape = _native.LaunchShape(packet_threads=288, payload_threads=256, payload_blocks=32,
        payload_bytes_per_block=4096, payload_message_bytes=1 << 17, dependent_launch=True)
    return _native.DeviceRuntime(options, shape, b"image", sys.argv[1] == "driver")

rails = [(device, port, gids[0][1], mtu) for device, port, _, _, mtu, gids in _native.rdma_ports()]
ranks = [make(0), make(1)]
try:
    path = {"rails": rails, "rail_timeout_s": 0.5, "traffic_class": 0, "service_level": 0}
    offers = [rank.open_link(**path, timeout_s=5.0) for rank in ranks]
except _native.CollectiveError as error:
    sys.exit(str(error))
for rank, offer in zip(ranks, offers[::-1]):
    rank.connect_link(offer, "the other")
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.close()
"""

LIMIT = (
    "raise the limit of locked memory (ulimit -l unlimited, memlock in /etc/security/limits.conf, or "
    "LimitMEMLOCK=infinity in a systemd unit)"
)
HANDOVER = (
    "; if it is unlimited, boot with kho=off on the kernel's command line: pages that lie in the memory reserved for "
    "kexec handover cannot be pinned once the GPU's driver uses them"
)


def run(programs: Programs, memory: str, **variables: str) -> subprocess.CompletedProcess[str]:
    libraries = f"{programs.libcuda()}:{programs.libibverbs('verbs_in_memory.cpp')}"
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, memory],
        env={**os.environ, "LD_LIBRARY_PATH": libraries, **variables},
        capture_output=True,
        text=True,
        timeout=BOUND,
    )


def test_the_nic_pins_a_region_before_the_gpu_does(programs: Programs, tmp_path: Path) -> None:
    """The other way round the NIC cannot: the kernel moves no page that the GPU's driver holds."""
    calls = traced(programs, "shared", tmp_path)
    regions = [index for index, (call, _, _) in enumerate(calls) if call == "cuda-register"]
    assert len(regions) == 2, "one for each rank"
    for index in regions:
        assert max(registrations(calls, index)) < index, calls


def test_memory_of_the_gpus_driver_is_pinned_by_the_nic_alone(programs: Programs, tmp_path: Path) -> None:
    """What others have run with on a GB10."""
    calls = traced(programs, "driver", tmp_path)
    assert all(call != "cuda-register" for call, _, _ in calls)
    sizes = [size for call, _, size in calls if call == "cuda-alloc"]
    largest = [index for index, (call, _, size) in enumerate(calls) if call == "cuda-alloc" and size == max(sizes)]
    assert len(largest) == 2, "a region of each rank"
    for index in largest:
        assert min(registrations(calls, index)) > index, calls


def traced(programs: Programs, memory: str, folder: Path) -> list[tuple[str, int, int]]:
    """The calls of the driver and of the NICs, in order: name, address, bytes."""
    trace = folder / "trace"
    done = run(programs, memory, TRACE=str(trace))
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in trace.read_text().splitlines()]
    return [(call, int(at), int(size)) for call, at, size in calls]


def registrations(calls: list[tuple[str, int, int]], region: int) -> list[int]:
    """Which calls register parts of the memory of the call `region` with a NIC."""
    _, start, size = calls[region]
    within = [
        number for number, (call, at, _) in enumerate(calls) if call == "nic-register" and start <= at < start + size
    ]
    assert len(within) == 4, "two rails register a sending and a receiving part each"
    return within


def test_memory_that_a_nic_cannot_pin(programs: Programs) -> None:
    done = run(programs, "shared", REFUSE_PINNING="1")
    assert done.returncode == 1
    start, _, remedy = done.stderr.strip().partition("); ")
    assert start.startswith("the RDMA device memory0 cannot pin ")
    assert start.endswith(" bytes of memory (Cannot allocate memory")
    assert remedy in (LIMIT, LIMIT + HANDOVER), "whichever this machine's kernel needs"


DEFAULT = "CONFIG_KEXEC_HANDOVER=y\nCONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y\n"


def remedy(programs: Programs, root: Path) -> subprocess.CompletedProcess[str]:
    """What is said of a machine whose files are below `root`."""
    program = programs.link("pin_remedy.cpp", *CHECKED)
    return subprocess.run(
        [program, str(root)], capture_output=True, text=True, timeout=60, check=True, env=without_preload()
    )


@pytest.mark.parametrize(
    ("command_line", "free", "total", "config", "reserved"),
    [
        ("quiet", 0, 0, "", False),
        (
            "quiet",
            60_000,
            65_536,
            "CONFIG_KEXEC_HANDOVER=y\n# CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT is not set\n",
            False,
        ),
        ("quiet", 9_752_576, 0, "", True),
        ("quiet", 9_752_576, 65_536, DEFAULT, True),
        ("quiet", 0, 0, DEFAULT, True),
        ("quiet kho=off", 9_752_576, 0, DEFAULT, False),
        ("kho=0 quiet", 0, 0, DEFAULT, False),
        ("kho=OFF", 9_752_576, 0, DEFAULT, False),
        ("kho=No", 9_752_576, 0, DEFAULT, False),
        ("kho=ON", 0, 0, "", True),
        ("kho=off kho=on", 0, 0, "", True),
        ("xkho=on", 0, 0, "", False),
    ],
)
def test_what_is_said_of_memory_reserved_for_kexec_handover(
    command_line: str, free: int, total: int, config: str, reserved: bool, programs: Programs, tmp_path: Path
) -> None:
    for path, text in (
        ("proc/cmdline", f"BOOT_IMAGE=/vmlinuz {command_line}\n"),
        ("proc/meminfo", f"MemTotal:  125829120 kB\nCmaTotal:  {total} kB\nCmaFree:  {free} kB\nBuffers: 1 kB\n"),
        ("proc/sys/kernel/osrelease", "7.0.0-1019-nvidia\n"),
        ("boot/config-7.0.0-1019-nvidia", config),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    done = remedy(programs, tmp_path)
    assert done.stdout.strip() == LIMIT + (HANDOVER if reserved else "")


def test_a_machine_whose_files_cannot_be_read(programs: Programs, tmp_path: Path) -> None:
    done = remedy(programs, tmp_path)
    assert done.stdout.strip() == LIMIT
