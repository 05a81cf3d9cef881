"""What the doctor finds on a machine. The machine is a folder of files as a GB10's kernel shows them, with faults."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from vllm_spark import _native
from vllm_spark.collective.launch_table import LaunchTable, store_launch_table
from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor import finding as finding_module
from vllm_spark.doctor.checks import MachineReport, is_bare, run_checks
from vllm_spark.doctor.finding import Finding, exit_code, worst
from vllm_spark.doctor.network import check_reach
from vllm_spark.doctor.rails import find_rails
from vllm_spark.doctor.rdma import pinned_bytes
from vllm_spark.doctor.rdma_mtu import check_rdma_mtu, rdma_mtu
from vllm_spark.doctor.report import Report, show
from vllm_spark.doctor.software import PLUGIN
from vllm_spark.doctor.system import System
from vllm_spark.errors import EXIT_PROBLEM, EXIT_WARNINGS
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.secret import load_secret, make_secret
from vllm_spark.executor.handshake.client import Connector
from vllm_spark.executor.handshake.messages import CONTROL
from vllm_spark.executor.handshake.server import Listener
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.records import from_json, to_json

from .folder_rights import no_entry
from .gb10_tree import GIB_IN_KIB, Tree, gb10
from .other_programs import foreign_context, program_at
from .test_channel import wait_for

UP = ("rocep1s0f0", "roceP2p1s0f0")
ENVIRONMENT = "_VLLMSPARK_TEST_TREE"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a secret, and no settings."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("VLLMSPARK_SECRET", "VLLMSPARK_SECRET_FILE", "VLLM_NCCL_SO_PATH"):
        monkeypatch.delenv(name, raising=False)
    make_secret(tmp_path / "config" / "vllm-spark" / "secret")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return gb10(tmp_path / "machine")


def findings(tree: Tree, peer: str | None = "10.0.0.2", config: SparkConfig | None = None) -> dict[str, Finding]:
    machine = run_checks(tree.system, config or SparkConfig(), peer)
    for found in machine.findings:
        assert found.title != "A check that failed", found
        assert_complete(found)
    names = [found.id for found in machine.findings]
    assert len(names) == len(set(names))
    return {found.id: found for found in machine.findings}


def assert_complete(found: Finding) -> None:
    """Whatever is not well is explained, and comes with a remedy."""
    if found.status in ("warning", "problem"):
        assert found.value
        assert found.explanation
        assert found.remedy
    for text in (found.explanation, *found.remedy.splitlines()):
        assert text == text.strip()
    assert not found.explanation or found.explanation.endswith((".", "?"))


# --- a machine on which all is well ----------------------------------------------------------------------------------

HEALTHY = """
import sys
from pathlib import Path
from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.checks import run_checks
from vllm_spark.doctor.report import Report
from vllm_spark.records import to_json
from vllm_spark.doctor.system import System
print(to_json(Report.of(run_checks(System(Path(sys.argv[1])), SparkConfig(), "10.0.0.2"), None, [])).decode())
"""


def test_a_healthy_machine(tree: Tree, tmp_path: Path) -> None:
    """In a process of its own, where torch is one for CUDA 13."""
    pytest.importorskip("vllm")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\n")
    environment = {"PYTHONPATH": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    argv = [sys.executable, "-c", HEALTHY, str(tree.root)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=True)
    report = json.loads(done.stdout)
    values = {found["id"]: found["value"] for found in report["machine"]["findings"]}
    status = {found["id"]: found["status"] for found in report["machine"]["findings"]}
    if not Path(_native.__file__).with_name("kernels.fatbin").exists():
        assert status.pop("gpu.kernels") == "problem"
    # What libibverbs would say cannot be laid out in files.
    assert status.pop("rdma.mtu") == "unknown"
    assert set(status.values()) == {"ok"}, status
    assert values["rdma.port"].count("ACTIVE 200 Gb/sec") == 2
    assert values["rdma.gid"] == "roceP2p1s0f0 index 3 (10.0.1.1), rocep1s0f0 index 3 (10.0.0.1)"
    assert values["link.rails"] == "roceP2p1s0f0, rocep1s0f0"
    assert values["link.mtu"] == "enP2p1s0f0np0 9000, enp1s0f0np0 9000"
    assert values["link.address"] == "enP2p1s0f0np0 10.0.1.1/24, enp1s0f0np0 10.0.0.1/24"
    assert values["link.peer"] == "10.0.0.2 through enp1s0f0np0 (rocep1s0f0)"
    assert values["gpu.driver"] == "NVIDIA GB10, driver 580.95.05, CUDA 13.0, torch for CUDA 13.0"
    assert values["gpu.clock"] == "208 MHz now, at most 3003 MHz, P8, 5 W"
    assert values["gpu.temperature"] == "41 degrees"
    assert values["gpu.programs"] == "none"
    assert values["machine.shm"] == "half of the memory"
    assert values["machine.clocks"] == "2.81 of 2.81 GHz, 3.90 of 3.90 GHz"


# --- faults ----------------------------------------------------------------------------------------------------------


def mtu_1500(tree: Tree) -> None:
    for netdev in ("enp1s0f0np0", "enP2p1s0f0np0"):
        tree.mtu(netdev, 1500)


def cable_out(tree: Tree) -> None:
    for device in UP:
        tree.port(device, "state", "1: DOWN")
        tree.port(device, "phys_state", "2: Polling")


def one_function_down(tree: Tree) -> None:
    tree.port("roceP2p1s0f0", "state", "1: DOWN")


def infiniband(tree: Tree) -> None:
    for device in UP:
        tree.port(device, "link_layer", "InfiniBand")


def roce_v1_only(tree: Tree) -> None:
    for device in UP:
        for path in tree.root.glob(f"sys/class/infiniband/{device}/ports/1/gid_attrs/types/*"):
            path.write_text("IB/RoCE v1\n")


def roce_v1_on_one(tree: Tree) -> None:
    for path in tree.root.glob("sys/class/infiniband/roceP2p1s0f0/ports/1/gid_attrs/types/*"):
        path.write_text("IB/RoCE v1\n")


def one_without_address(tree: Tree) -> None:
    tree.addresses({"rocep1s0f0": "10.0.0.1/24"})


def both_without_address(tree: Tree) -> None:
    tree.addresses({})


def one_network(tree: Tree) -> None:
    tree.addresses({"rocep1s0f0": "169.254.3.1/16", "roceP2p1s0f0": "169.254.4.1/16"})


def another_network(tree: Tree) -> None:
    tree.addresses({"rocep1s0f0": "10.9.0.1/24", "roceP2p1s0f0": "10.0.1.1/24"})


def no_route(tree: Tree) -> None:
    tree.write("proc/net/route", "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT")


def narrow_lanes(tree: Tree) -> None:
    tree.write("sys/devices/pci/0002:01:00.0/current_link_width", "2")


def no_device_file(tree: Tree) -> None:
    tree.remove("dev/infiniband/uverbs2")


def small_memlock(tree: Tree) -> None:
    tree.write("proc/self/limits", "Max locked memory         8388608              8388608              bytes")


def handover_memory(tree: Tree) -> None:
    tree.write("proc/meminfo", (tree.system.text("proc/meminfo") or "").replace("CmaFree: 65536", "CmaFree: 9752576"))


def handover_memory_in_use(tree: Tree) -> None:
    """Nothing of it is free just now, so the kernel's counters do not show it."""
    tree.write("proc/sys/kernel/osrelease", "7.0.0-1019-nvidia")
    tree.write("boot/config-7.0.0-1019-nvidia", "CONFIG_KEXEC_HANDOVER=y\nCONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y")


def handover_asked_for(tree: Tree) -> None:
    tree.write("proc/cmdline", "quiet kho=off kho=on")


def translating_iommu(tree: Tree) -> None:
    tree.write("sys/devices/pci/0000:01:00.0/iommu_group/type", "DMA-FQ")


def slow_governor(tree: Tree) -> None:
    tree.write("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "powersave")


def other_governor(tree: Tree) -> None:
    tree.write("sys/devices/system/cpu/cpu1/cpufreq/scaling_governor", "schedutil")


def firmware_governor(tree: Tree) -> None:
    slow_governor(tree)
    tree.write("sys/devices/system/cpu/cpu1/cpufreq/scaling_driver", "intel_pstate")


def capped_clock(tree: Tree) -> None:
    tree.write("sys/devices/system/cpu/cpu1/cpufreq/scaling_max_freq", "1800000")


def default_route(tree: Tree) -> None:
    """The address that is named is that of the office network."""
    routes = (tree.root / "proc/net/route").read_text()
    tree.write("proc/net/route", routes.replace("wlP9s9", "enp1s0f0np0"))


def neighbours(tree: Tree) -> None:
    lines = [f"10.0.0.{number} 0x1 0x2 02:00:00:00:00:0{number} * enp1s0f0np0" for number in range(2, 7)]
    tree.write("proc/net/arp", "\n".join(["IP address HW type Flags HW address Mask Device", *lines]))


def ufw(tree: Tree) -> None:
    tree.write("etc/ufw/ufw.conf", "# comment\nENABLED=yes\nLOGLEVEL=low")


def firewalld(tree: Tree) -> None:
    tree.program("firewall-cmd", "#!/bin/sh\n[ $1 = --state ] && echo running")


def memory(tree: Tree, available: int, cached: int, swap_free: int) -> None:
    tree.write(
        "proc/meminfo",
        f"MemTotal: {120 * GIB_IN_KIB} kB\nMemAvailable: {available * GIB_IN_KIB} kB\n"
        f"Cached: {cached * GIB_IN_KIB} kB\nSwapTotal: {16 * GIB_IN_KIB} kB\nSwapFree: {swap_free * GIB_IN_KIB} kB",
    )


def memory_taken(tree: Tree) -> None:
    memory(tree, 40, 10, 16)


def memory_cached(tree: Tree) -> None:
    memory(tree, 100, 60, 16)


def swapped(tree: Tree) -> None:
    memory(tree, 100, 1, 9)


def driver_mismatch(tree: Tree) -> None:
    tree.program("nvidia-smi", "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")


def no_nvidia_smi(tree: Tree) -> None:
    tree.remove("usr/bin/nvidia-smi")


def throttled(tree: Tree) -> None:
    tree.nvidia_smi("Power Brake Slowdown       : Not Active", "Power Brake Slowdown       : Active")


def slowed_by_heat(tree: Tree) -> None:
    tree.nvidia_smi("SW Thermal Slowdown               : Not Active", "SW Thermal Slowdown               : Active")


def computing(tree: Tree, mhz: int, watts: str = "60.10") -> None:
    """A program computes at this clock."""
    tree.nvidia_smi("GPU                               : 0 %", "GPU                               : 96 %")
    tree.nvidia_smi(": P8", ": P0")
    tree.nvidia_smi(": 4.52 W", f": {watts} W")
    tree.nvidia_smi("SM                                : 208 MHz", f"SM                                : {mhz} MHz")


def stuck_clock(tree: Tree) -> None:
    computing(tree, 611, "15.30")


def limited_clock(tree: Tree) -> None:
    computing(tree, 2100)


def hot(tree: Tree) -> None:
    tree.nvidia_smi(": 41 C", ": 92 C")


def another_job(tree: Tree) -> None:
    tree.nvidia_smi("Type                          : G", "Type                          : C")
    tree.nvidia_smi("/usr/lib/xorg/Xorg", "python3 train.py")


def another_engine(tree: Tree) -> None:
    another_job(tree)
    tree.nvidia_smi("python3 train.py", "VLLM::EngineCore")


def display_in_use(tree: Tree) -> None:
    tree.nvidia_smi(": Disabled", ": Enabled")


def memlock_of_a_container(tree: Tree) -> None:
    tree.write("proc/self/limits", "Max locked memory         65536                65536                bytes")


def shm_of_a_container(tree: Tree) -> None:
    tree.write("proc/mounts", "shm /dev/shm tmpfs rw,nosuid,nodev,noexec,relatime,size=65536k,inode64 0 0")


def shm_in_megabytes(tree: Tree) -> None:
    tree.write("proc/mounts", "shm /dev/shm tmpfs rw,size=512m 0 0")


def no_gpu(tree: Tree) -> None:
    no_nvidia_smi(tree)
    tree.remove("proc/driver/nvidia/version")


@pytest.mark.parametrize(
    ("fault", "name", "status", "parts"),
    [
        (mtu_1500, "link.mtu", "warning", ["enp1s0f0np0 1500", "2.7 times", "ip link set dev enP2p1s0f0np0 mtu 9000"]),
        (cable_out, "rdma.port", "problem", ["rocep1s0f0 DOWN (Polling)", "cable"]),
        (one_function_down, "link.rails", "warning", ["roceP2p1s0f0 not", "189.9", "set dev enP2p1s0f0np0 up"]),
        (infiniband, "rdma.port", "problem", ["rocep1s0f0 is InfiniBand", "0002:01:00.0 set LINK_TYPE_P1=2"]),
        (roce_v1_only, "rdma.gid", "problem", ["none (IB/RoCE v1 only)", "pci/0000:01:00.0 name enable_roce"]),
        (roce_v1_on_one, "rdma.gid", "warning", ["index 3 (10.0.0.1)", "pci/0002:01:00.0 name enable_roce"]),
        (
            one_without_address,
            "link.address",
            "warning",
            ["enP2p1s0f0np0 none", "ipv4.addresses 10.0.1.1/24 ipv6.method"],
        ),
        (
            both_without_address,
            "link.address",
            "problem",
            ["No rail here has one", "ifname enp1s0f0np0 ipv4.method manual ipv4.addresses 10.0.1.1/24"],
        ),
        (one_network, "link.networks", "warning", ["169.254.0.0/16", "10.0.1.1/24"]),
        (another_network, "link.peer", "problem", ["10.0.0.2 through wlP9s9", "10.9.0.1/24", "--spark-address"]),
        (no_route, "link.peer", "problem", ["no route to 10.0.0.2"]),
        (
            default_route,
            "link.shared",
            "warning",
            ["enp1s0f0np0 has the default route", "neither encrypted nor authenticated", "--spark-address"],
        ),
        (
            neighbours,
            "link.shared",
            "warning",
            ["has 5 other machines in its network (10.0.0.2, 10.0.0.3, 10.0.0.4 and 2 more)"],
        ),
        (ufw, "link.firewall", "note", ["ufw allow in on enp1s0f0np0 to any port 29650 proto tcp"]),
        (firewalld, "link.firewall", "note", ["firewalld is active", "--add-port=29650/tcp"]),
        (narrow_lanes, "link.pcie", "warning", ["roceP2p1s0f0 x2", "fwupdmgr"]),
        (no_device_file, "rdma.access", "problem", ["/dev/infiniband/uverbs2", "--device /dev/infiniband"]),
        (small_memlock, "machine.memlock", "problem", ["8.4 MB", "35 MB", "memlock unlimited"]),
        (handover_memory, "machine.handover", "warning", ["9.3 GiB", "0.1 GiB", "kho=off", "ENOMEM"]),
        (handover_memory_in_use, "machine.handover", "warning", ["by default", "kho=off"]),
        (handover_asked_for, "machine.handover", "warning", ["kho=on", "kho=off"]),
        (translating_iommu, "machine.iommu", "note", ["rocep1s0f0 DMA-FQ", "iommu.passthrough=1"]),
        (slow_governor, "machine.governor", "warning", ["performance, powersave", "tee /sys/devices/system/cpu"]),
        (other_governor, "machine.governor", "note", ["performance, schedutil"]),
        (firmware_governor, "machine.governor", "note", ["performance, powersave"]),
        (capped_clock, "machine.clocks", "warning", ["1.80 of 3.90 GHz", "--max"]),
        (memory_taken, "machine.memory", "warning", ["40.0 of 120.0 GiB", "ps "]),
        (memory_cached, "machine.memory", "note", ["60.0 of it file cache", "drop_caches"]),
        (swapped, "machine.swap", "warning", ["7.0 of 16.0 GiB used", "swapoff"]),
        (driver_mismatch, "gpu.driver", "problem", ["NVIDIA GB10", "mismatch", "reboot"]),
        (no_nvidia_smi, "gpu.driver", "unknown", ["driver 580.95.05", "nvidia-smi is not installed"]),
        (memlock_of_a_container, "machine.memlock", "problem", ["64 KiB", "docker run --ulimit memlock=-1"]),
        (shm_of_a_container, "machine.shm", "warning", ["64 MiB", "SIGBUS", "docker run --shm-size 8g"]),
        (shm_in_megabytes, "machine.shm", "warning", ["512 MiB"]),
        (stuck_clock, "gpu.clock", "warning", ["611 MHz now", "P0, 15 W, 96 % busy", "60 to 80 %", "unplug"]),
        (limited_clock, "gpu.clock", "note", ["2100 MHz now", "15 to 35 %", "nvidia-smi -rgc"]),
        (slowed_by_heat, "gpu.clock", "warning", ["slowed: SW Thermal Slowdown"]),
        (hot, "gpu.temperature", "warning", ["92 degrees", "-lgc 0,2100"]),
        (another_job, "gpu.programs", "warning", ["python3 train.py (process 2177, 43 MiB)", "kill 2177"]),
        (another_engine, "gpu.programs", "note", ["VLLM::EngineCore"]),
        (throttled, "gpu.clock", "warning", ["HW Power Brake Slowdown", "power supply"]),
        (display_in_use, "gpu.display", "warning", ["ends kernels", "multi-user.target"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault(tree: Tree, fault: Callable[[Tree], None], name: str, status: str, parts: list[str]) -> None:
    before = findings(tree)[name].status
    fault(tree)
    found = findings(tree)[name]
    assert before != status, "the healthy machine would pass for the faulty one"
    assert found.status == status
    for part in parts:
        assert part in f"{found.value}\n{found.explanation}\n{found.remedy}"


@pytest.mark.parametrize("mhz", [208, 2411, 3003])
def test_a_clock_that_is_well(tree: Tree, mhz: int) -> None:
    """Low while nothing runs, or as high as a GB10's under load."""
    if mhz > 208:
        computing(tree, mhz)
    assert findings(tree)["gpu.clock"].status == "ok"


def test_nvidia_smi_of_another_version(tree: Tree) -> None:
    """What it leaves out is not reported, and fails nothing."""
    tree.program("nvidia-smi", "#!/bin/sh\necho 'Driver Version : 580.95.05'")
    found = findings(tree)
    assert not {"gpu.clock", "gpu.temperature", "gpu.display"} & found.keys()
    assert found["gpu.programs"].value == "none"


def test_one_neighbour_is_the_other_machine(tree: Tree) -> None:
    """And what did not answer, or is at another interface, is none."""
    tree.write(
        "proc/net/arp",
        "IP address HW type Flags HW address Mask Device\n"
        "10.0.0.2 0x1 0x2 02:00:00:00:00:02 * enp1s0f0np0\n"
        "10.0.0.3 0x1 0x0 00:00:00:00:00:00 * enp1s0f0np0\n"
        "192.168.1.1 0x1 0x2 02:00:00:00:00:03 * wlP9s9",
    )
    assert findings(tree)["link.shared"].status == "ok"


def test_a_default_route_of_ipv6_counts_too(tree: Tree) -> None:
    zeros = "0" * 32
    fields = f"{zeros} 00 {zeros} 00 {{}} 00000400 00000001 00000000 00000003 {{}}"
    tree.write("proc/net/ipv6_route", fields.format(zeros, "lo"))
    assert findings(tree)["link.shared"].status == "ok"
    tree.write("proc/net/ipv6_route", fields.format("fe80" + "0" * 27 + "1", "enp1s0f0np0"))
    assert findings(tree)["link.shared"].value == "enp1s0f0np0 has the default route"


def test_the_port_that_is_set_is_the_one_that_is_opened(tree: Tree) -> None:
    ufw(tree)
    for config in (SparkConfig(port=4711), SparkConfig(leader="10.0.0.2:4711")):
        assert "to any port 4711 proto" in findings(tree, config=config)["link.firewall"].remedy


def port_finding(port: int) -> Finding:
    found = check_reach("127.0.0.1", SparkConfig(), port)
    assert_complete(found)
    return found


@pytest.fixture
def leader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Listener]:
    """A leader that waits, with the secret that the doctor reads for a loopback address."""
    caplog.set_level("INFO", "vllm_spark")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = Listener("127.0.0.1", 0, tls_context(load_secret(SparkConfig(), "127.0.0.1"), "leader"), 1 << 20)
    yield made
    made.close()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname != "INFO"]


def test_a_leader_at_the_port(leader: Listener, caplog: pytest.LogCaptureFixture) -> None:
    """It is found, keeps its place free for a follower, and has no warning."""
    port = int(leader.endpoint.rpartition(":")[2])
    for _ in range(2):
        found = port_finding(port)
        assert found.status == "ok"
        assert re.fullmatch(rf"a leader on .* \(process {os.getpid()}\) waits at .*, with the same secret", found.value)
    wait_for(lambda: "vllm-spark doctor on" in caplog.text, "the leader's line")
    assert warnings_of(caplog) == []
    assert leader._last_problem == ""
    context = tls_context(load_secret(SparkConfig(), "127.0.0.1"), "follower")
    control = Connector("127.0.0.1", port, context, 1 << 20).connect(CONTROL)
    assert control is not None
    found = port_finding(port)
    assert found.status == "note"
    assert "has a follower already" in found.value
    control.close()
    assert warnings_of(caplog) == []


def test_a_leader_with_another_secret_or_without_one_here(
    leader: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(leader.endpoint.rpartition(":")[2])
    monkeypatch.setenv("VLLMSPARK_SECRET", "short")
    found = port_finding(port)
    assert (found.status, found.explanation) == ("unknown", "This machine has no secret to compare.")
    wait_for(lambda: "checked this port" in caplog.text, "the leader's line")
    assert "another secret" not in caplog.text
    monkeypatch.setenv("VLLMSPARK_SECRET", "another one, as long")
    found = port_finding(port)
    assert found.status == "problem"
    assert "another secret than the one that this side reads from the variable VLLMSPARK_SECRET" in found.value
    wait_for(lambda: caplog.text.count("checked this port") == 2, "the leader's lines")
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"", "accepts connections, but closes them before they are authenticated"),
        (None, "accepts connections, but sends nothing within 0.5 s"),
        (b"\r\nhello", "it sent 'hello'"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "it sent 'SSH-2.0-OpenSSH_9.6'"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it sent 'HTTP/1.1 400 Bad Request'"),
        ("tls", "its TLS certificate was issued by O=Example Proxies, CN=Interception CA"),
    ],
    ids=["closes", "silent", "text", "SSH", "HTTP", "TLS"],
)
@pytest.mark.parametrize("secret", ["short", "one that is long enough"])
def test_another_program_at_the_leaders_port(
    answer: bytes | str | None, seen: str, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLMSPARK_SECRET", secret)
    for module in ("check", "client"):
        monkeypatch.setattr(f"vllm_spark.executor.handshake.{module}.GREETING_TIMEOUT", 0.5)
    with program_at(foreign_context(tmp_path) if isinstance(answer, str) else answer) as port:
        found = port_finding(port)
        assert found.status == "problem"
        assert seen in found.value
        assert found.remedy == f"sudo ss -ltnp 'sport = :{port}'   # there: which program has the port"
    found = port_finding(port)
    assert (found.status, found.value) == ("ok", f"127.0.0.1:{port} can be reached, nothing listens there now")


@pytest.mark.parametrize("option", ["kho=off", "kho=OFF", "kho=0", "kho=n"])
def test_memory_that_is_not_reserved_for_handover(tree: Tree, option: str) -> None:
    handover_memory(tree)
    handover_memory_in_use(tree)
    assert findings(tree)["machine.handover"].status == "warning"
    tree.write("proc/cmdline", f"quiet {option} splash")
    found = findings(tree)["machine.handover"]
    assert (found.status, found.value) == ("ok", f"none ({option})")


def test_memory_reserved_for_handover_counts_on_a_gb10_alone(tree: Tree) -> None:
    handover_memory(tree)
    tree.write("proc/driver/nvidia/gpus/000f:01:00.0/information", "Model: \t\t NVIDIA H200")
    assert "machine.handover" not in findings(tree)


def test_nothing_follows_from_a_missing_cable(tree: Tree) -> None:
    """No word on MTU, addresses or limits of rails that do not exist."""
    cable_out(tree)
    names = set(findings(tree))
    assert {name for name in names if name.startswith(("rdma", "link"))} == {"rdma.devices", "rdma.port"}
    assert "machine.memlock" not in names


def test_nothing_follows_from_missing_addresses(tree: Tree) -> None:
    both_without_address(tree)
    assert not {"link.networks", "link.peer"} & set(findings(tree))


@pytest.mark.parametrize("depth", [1, 4, 64])
@pytest.mark.parametrize(("slot_kib", "packet_kib"), [(4, 0), (64, 1), (1024, 1024), (1023, 7)])
def test_memory_that_is_locked_is_what_a_runtime_takes(slot_kib: int, packet_kib: int, depth: int) -> None:
    """For each of two rails, whatever the settings: that much, and not a page less."""
    options = _native.Options(
        rank=0,
        slot_bytes=slot_kib << 10,
        packet_bytes=packet_kib << 10,
        depth=depth,
        proxied=False,
        stripes=1,
        timeout_s=1.0,
        first_sequence=1,
        largest_message=1 << 20,
        clear_interval=128,
    )
    native = _native.Runtime(options)
    _, descriptor, *_ = native.address()
    taken = os.fstat(descriptor).st_size
    native.close()
    assert pinned_bytes(SparkConfig(slot_kib=slot_kib, packet_kib=packet_kib, depth=depth), 2) == 2 * taken


def _region_bytes(packet_kib: int) -> int:
    return _native.region_bytes(slot_bytes=1 << 20, packet_bytes=packet_kib << 10, depth=4)


def test_packets_of_a_launch_table_take_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    assert pinned_bytes(SparkConfig(), 1) == _region_bytes(16)
    table = tmp_path / "launch.json"
    store_launch_table(LaunchTable(loopback_mode="proxied", packet_kib=64), table)
    assert pinned_bytes(SparkConfig(launch_table=table), 1) == _region_bytes(64)
    assert pinned_bytes(SparkConfig(launch_table=table, packet_kib=4), 1) == _region_bytes(4)
    table.write_text("{")
    assert pinned_bytes(SparkConfig(launch_table=table), 1) == _region_bytes(16)
    assert pinned_bytes(SparkConfig(launch_table=table, packet_kib=4), 1) == _region_bytes(4)


def test_who_may_lock_memory(tree: Tree) -> None:
    needed = pinned_bytes(SparkConfig(), rails=2)
    tree.write("proc/self/limits", f"Max locked memory {needed} {needed} bytes")
    assert findings(tree)["machine.memlock"].status == "ok"
    more = SparkConfig(slot_kib=2048)
    assert findings(tree, config=more)["machine.memlock"].status == "problem"
    tree.write("proc/self/status", "CapEff:\t0000000000004000")
    assert findings(tree, config=more)["machine.memlock"].status == "ok"


def test_lockable_memory_without_the_native_module(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_spark._native", None)
    tree.write("proc/self/limits", "Max locked memory unlimited unlimited bytes")
    assert findings(tree)["machine.memlock"].status == "ok"
    tree.write("proc/self/limits", "Max locked memory 8000000 8000000 bytes")
    found = findings(tree)["machine.memlock"]
    assert (found.status, found.value) == ("unknown", "8.0 MB")


@pytest.mark.parametrize(
    ("interface", "packets"), [(1500, 1024), (2200, 2048), (4191, 2048), (4192, 4096), (9000, 4096), (0, 0)]
)
def test_packets_that_fit_an_mtu(interface: int, packets: int) -> None:
    assert rdma_mtu(interface) == packets


@pytest.mark.parametrize(
    ("interface", "measured", "status"),
    [(9000, 4096, "ok"), (1500, 1024, "note"), (9000, 1024, "warning"), (9000, None, "unknown")],
)
def test_packets_that_a_port_uses(tree: Tree, interface: int, measured: int | None, status: str) -> None:
    """What follows from the interface's MTU is warned of there, and once."""
    for netdev in ("enp1s0f0np0", "enP2p1s0f0np0"):
        tree.mtu(netdev, interface)
    found = check_rdma_mtu(find_rails(tree.system), {} if measured is None else dict.fromkeys(UP, measured))
    assert_complete(found)
    assert found.status == status
    if status == "unknown":
        assert "pyverbs is not installed" in found.explanation
        assert "rocep1s0f0 4096" in found.explanation


def test_a_port_without_gids_still_has_its_interface(tree: Tree) -> None:
    tree.remove("sys/class/infiniband/*/ports/1/gids/*")
    tree.remove("sys/class/infiniband/*/ports/1/gid_attrs/ndevs/*")
    found = findings(tree)
    assert found["rdma.gid"].status == "problem"
    assert "enp1s0f0np0 none" in found["link.address"].value


def test_an_ordinary_network_card_has_one_function_for_each_port(tree: Tree) -> None:
    tree.write("sys/class/net/enP2p1s0f0np0/phys_port_name", "p2")
    tree.write("sys/class/net/enP2p1s0f1np1/phys_port_name", "p3")
    assert findings(tree)["link.rails"].status == "not applicable"


def test_without_a_peer_nothing_is_said_of_the_way_to_it(tree: Tree) -> None:
    assert findings(tree, peer=None)["link.peer"].status == "not applicable"
    assert findings(tree, peer="127.0.0.1")["link.peer"].status == "not applicable"


def test_a_peer_of_the_sixth_version(tree: Tree) -> None:
    assert findings(tree, peer="fe80::5%enP2p1s0f0np0")["link.peer"].value.startswith("fe80::5%enP2p1s0f0np0 through")


def test_addresses_of_the_sixth_version(tree: Tree) -> None:
    tree.addresses({})
    tree.write("proc/net/if_inet6", "fd000000000000000000000000000001 03 40 00 80 enp1s0f0np0")
    assert "enp1s0f0np0 fd00::1/64" in findings(tree)["link.address"].value


# --- the GPU's libraries ---------------------------------------------------------------------------------------------


def test_nccl_of_pip(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "site-packages"
    (packages / "nvidia_nccl_cu13-2.28.9.dist-info").mkdir(parents=True)
    (packages / "nvidia_nccl_cu13-2.28.9.dist-info" / "METADATA").write_text(
        "Name: nvidia-nccl-cu13\nVersion: 2.28.9\n"
    )
    library = packages / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.syspath_prepend(packages)
    found = findings(tree)["gpu.nccl"]
    assert (found.status, found.value) == ("warning", "2.28.9 from pip")
    assert "42354" in found.explanation
    assert "sudo apt install libnccl2" in found.remedy
    tree.write("usr/lib/aarch64-linux-gnu/libnccl.so.2", "")
    assert findings(tree)["gpu.nccl"].remedy.startswith(f"ln -sf /usr/lib/aarch64-linux-gnu/libnccl.so.2 {library}")
    library.unlink()
    library.symlink_to(tree.root / "usr/lib/aarch64-linux-gnu/libnccl.so.2")
    assert findings(tree)["gpu.nccl"].status == "ok"


def test_kernels_of_this_build(tree: Tree) -> None:
    built = Path(_native.__file__).with_name("kernels.fatbin").exists()
    assert findings(tree)["gpu.kernels"].status == ("ok" if built else "problem")


@pytest.mark.parametrize(("allowed", "left_out"), [("", True), ("other", True), ("other,spark", False), (None, False)])
def test_a_list_of_plugins_that_leaves_this_one_out(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, allowed: str | None, left_out: bool
) -> None:
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    found = findings(tree).get("software.plugins")
    assert (found is not None) == left_out
    if found is not None:
        assert found.status == "problem"
        assert "does not know --spark" in found.explanation


def test_the_plugin_has_the_name_that_vllm_finds() -> None:
    (entry,) = (each for each in entry_points(group="vllm.general_plugins") if each.module.startswith("vllm_spark"))
    assert entry.name == PLUGIN


# --- the secret ------------------------------------------------------------------------------------------------------


def test_secret(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config" / "vllm-spark" / "secret"
    assert findings(tree)["software.secret"].value == f"in {path}"
    path.chmod(0o640)
    found = findings(tree)["software.secret"]
    assert (found.status, found.value, found.remedy) == ("problem", "unusable", f"chmod 600 {path}")
    path.unlink()
    found = findings(tree)["software.secret"]
    assert (found.status, found.value) == ("problem", "none")
    assert found.remedy.startswith("vllm-spark doctor --make-secret")
    monkeypatch.setenv("VLLMSPARK_SECRET", "long enough for everybody")
    assert findings(tree)["software.secret"].value == "in VLLMSPARK_SECRET"


def test_a_secret_that_cannot_be_read(tree: Tree, tmp_path: Path) -> None:
    folder = tmp_path / "config" / "vllm-spark"
    with no_entry(folder):
        found = findings(tree)["software.secret"]
    assert (found.status, found.value) == ("problem", "unusable")
    assert found.explanation == f"The secret file {folder}/secret cannot be read (Permission denied)."
    found = findings(tree, config=SparkConfig(secret_file=tmp_path / "none"))["software.secret"]
    assert (found.status, found.value) == ("problem", "unusable"), "one that was asked for is needed"
    assert "No such file" in found.explanation


# --- machines that lack it all ---------------------------------------------------------------------------------------


def test_a_bare_machine_is_told_two_things(tmp_path: Path) -> None:
    machine = run_checks(System(tmp_path), SparkConfig())
    assert [found.id for found in machine.findings] == ["rdma.devices", "gpu.driver"]
    assert is_bare(machine)
    assert Report.of(machine, None, []).exit_code == EXIT_PROBLEM
    assert len(run_checks(System(tmp_path), SparkConfig(), thorough=True).findings) > 4


def test_a_machine_without_one_of_them_is_not_bare(tree: Tree, tmp_path: Path) -> None:
    no_gpu(tree)
    assert not is_bare(run_checks(tree.system, SparkConfig()))
    only_gpu = Tree(tmp_path / "other")
    only_gpu.write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX  x86_64  580.95.05")
    machine = run_checks(only_gpu.system, SparkConfig())
    assert not is_bare(machine)
    assert not any(found.area == "link" for found in machine.findings)


def test_a_check_that_stumbles_leaves_the_others(tree: Tree) -> None:
    tree.write("proc/self/limits", "Max locked memory         many            many            bytes")
    machine = run_checks(tree.system, SparkConfig())
    found = {one.id: one for one in machine.findings}
    assert found["machine"].status == "unknown"
    assert "many" in found["machine"].value
    assert "software.secret" in found


# --- the report ------------------------------------------------------------------------------------------------------


def shown(report: Report, width: int = 100) -> str:
    stream = StringIO()
    show(report, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def test_a_check_that_does_not_apply_gives_the_reason() -> None:
    machine = run_checks_of(Finding("machine.governor", "Processor governor", "not applicable", "", "No clocks here."))
    assert "Processor governor\n          No clocks here.\n" in shown(Report.of(machine, None, []))
    peer = dataclasses.replace(machine, host="desk2")
    assert "No clocks here." in shown(Report.of(machine, peer, []))


def run_checks_of(*findings: Finding) -> MachineReport:
    """The report of a machine with these findings alone."""
    return MachineReport("desk1", Versions.of_this_process(), [], list(findings))


def test_the_worst_counts() -> None:
    def status(*statuses: finding_module.Status) -> int:
        return exit_code(worst(Finding("a.b", "t", one) for one in statuses))

    assert status() == 0
    assert status("ok", "note", "unknown", "not applicable") == 0
    assert status("warning", "ok") == EXIT_WARNINGS
    assert status("warning", "problem", "ok") == EXIT_PROBLEM


def test_the_report_names_each_remedy_in_one_line(tree: Tree) -> None:
    mtu_1500(tree)
    small_memlock(tree)
    text = shown(Report.of(run_checks(tree.system, SparkConfig()), None, []), width=60)
    assert "warning MTU of the interfaces: " in text
    assert "PROBLEM Limit of locked memory: 8.4 MB" in text
    assert '> echo "$USER - memlock unlimited" | sudo tee /etc/security/limits.d/90-vllm-spark.conf' in text
    assert "the pair does not work" in text


def test_the_report_travels_as_json(tree: Tree) -> None:
    report = Report.of(run_checks(tree.system, SparkConfig()), None, [])
    assert from_json(to_json(report), Report) == report
    assert json.loads(to_json(report))["worst"] == report.worst


def test_what_the_other_machine_says_cannot_move_the_cursor(tree: Tree) -> None:
    machine = run_checks(tree.system, SparkConfig())
    evil = Finding("rdma.port", "\x1b[2Jtitle", "problem", "[red]\x1b]0;x\x07", "\x1b[31mwhy", "\x1b[1mhow")
    peer = MachineReport("\x1b[1mhost", machine.versions, [], [evil])
    text = shown(Report.of(machine, peer, [evil]))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]" in text
