"""The files that a GB10's kernel shows: two ConnectX-7 functions with a cable, two without, one GPU, all well."""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vllm_spark.doctor.system import System

GIB_IN_KIB = 1 << 20


class Function(NamedTuple):
    """One PCIe function of the network card."""

    device: str
    netdev: str
    pci: str
    connector: str
    network: str
    """First three numbers of its IPv4 network; empty without a cable."""


FUNCTIONS = (
    Function("rocep1s0f0", "enp1s0f0np0", "0000:01:00.0", "p0", "10.0.0"),
    Function("rocep1s0f1", "enp1s0f1np1", "0000:01:00.1", "p1", ""),
    Function("roceP2p1s0f0", "enP2p1s0f0np0", "0002:01:00.0", "p0", "10.0.1"),
    Function("roceP2p1s0f1", "enP2p1s0f1np1", "0002:01:00.1", "p1", ""),
)

NVIDIA_SMI = """
==============NVSMI LOG==============

Timestamp                                 : Mon Nov 24 10:00:00 2025
Driver Version                            : 580.95.05
CUDA Version                              : 13.0

Attached GPUs                             : 1
GPU 0000000F:01:00.0
    Product Name                          : NVIDIA GB10
    Display Active                        : Disabled
    Product Architecture                  : Blackwell
    Performance State                     : P8
    Clocks Event Reasons
        Idle                              : Active
        HW Slowdown                       : Not Active
            HW Thermal Slowdown           : Not Active
            HW Power Brake Slowdown       : Not Active
        SW Thermal Slowdown               : Not Active
    FB Memory Usage
        Total                             : N/A
        Used                              : N/A
    Utilization
        GPU                               : 0 %
        Memory                            : 0 %
    Temperature
        GPU Current Temp                  : 41 C
        GPU T.Limit Temp                  : N/A
        GPU Slowdown Temp                 : N/A
    GPU Power Readings
        Average Power Draw                : N/A
        Instantaneous Power Draw          : 4.52 W
        Current Power Limit               : N/A
    Clocks
        Graphics                          : 208 MHz
        SM                                : 208 MHz
        Memory                            : N/A
        Video                             : 598 MHz
    Max Clocks
        Graphics                          : 3003 MHz
        SM                                : 3003 MHz
        Memory                            : N/A
    Processes
        GPU instance ID                   : N/A
        Compute instance ID               : N/A
        Process ID                        : 2177
            Type                          : G
            Name                          : /usr/lib/xorg/Xorg
            Used GPU Memory               : 43 MiB
"""

PING = """#!/bin/sh
# As ping of iputils: the addresses ANSWERING are there, and packets of more than LARGEST bytes are lost.
for word in "$@"; do address=$word; [ "$last" = -s ] && size=$word; last=$word; done
echo "PING $address ($address) $size($((size + 28))) bytes of data."
case " ANSWERING " in *" $address "*) answers=yes;; esac
if [ "$answers" ] && [ "$size" -le LARGEST ]; then
    echo "2 packets transmitted, 2 received, 0% packet loss, time 201ms"
    echo "rtt min/avg/max/mdev = 0.061/0.083/0.105/0.022 ms"
    exit 0
fi
echo "2 packets transmitted, 0 received, 100% packet loss, time 201ms"
exit 1
"""


class Tree:
    """A machine as files below `root`; what is written or removed there changes it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def system(self) -> System:
        """For the checks."""
        return System(self.root)

    def write(self, path: str, text: str) -> None:
        """Makes a file, with its folders."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text + "\n")

    def program(self, name: str, script: str) -> None:
        """Makes a program."""
        self.write(f"usr/bin/{name}", script)
        (self.root / f"usr/bin/{name}").chmod(0o755)

    def nvidia_smi(self, old: str, new: str) -> None:
        """Replaces a part of what nvidia-smi prints."""
        path = self.root / "usr/bin/nvidia-smi"
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))

    def link(self, path: str, target: str) -> None:
        """Makes a symbolic link."""
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).symlink_to(target)

    def remove(self, pattern: str) -> None:
        """Deletes files and links."""
        for path in self.root.glob(pattern):
            path.unlink()

    def port(self, device: str, path: str, text: str) -> None:
        """Writes an attribute of a device's port."""
        self.write(f"sys/class/infiniband/{device}/ports/1/{path}", text)

    def mtu(self, netdev: str, mtu: int) -> None:
        """Sets an interface's MTU."""
        self.write(f"sys/class/net/{netdev}/mtu", str(mtu))

    def answering(self, *addresses: str, largest: int = 9000) -> None:
        """Makes a ping that reaches these addresses."""
        script = PING.replace("ANSWERING", " ".join(addresses)).replace("LARGEST", str(largest - 28))
        self.program("ping", script)

    def addresses(self, given: dict[str, str]) -> None:
        """Gives each device the address and prefix in `given`, and takes all others away."""
        routes = ["Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT"]
        routes.append(f"wlP9s9 {_number('0.0.0.0')} {_number('192.168.1.1')} 0003 0 0 600 {_number('0.0.0.0')} 0 0 0")
        for function in FUNCTIONS:
            self.remove(f"sys/class/infiniband/{function.device}/ports/1/gids/*")
            self.remove(f"sys/class/infiniband/{function.device}/ports/1/gid_attrs/*/*")
            address = given.get(function.device, "")
            for index, (gid, kind) in enumerate(_gids(function, address)):
                self.port(function.device, f"gids/{index}", gid)
                self.port(function.device, f"gid_attrs/types/{index}", kind)
                self.port(function.device, f"gid_attrs/ndevs/{index}", function.netdev)
            self.port(function.device, "gids/9", "0000:" * 7 + "0000")
            if address:
                network = ipaddress.ip_interface(address).network
                target, mask = _number(str(network.network_address)), _number(str(network.netmask))
                routes.append(f"{function.netdev} {target} {_number('0.0.0.0')} 0001 0 0 100 {mask} 0 0 0")
        self.write("proc/net/route", "\n".join(routes))


def gb10(root: Path, host: int = 1) -> Tree:
    """Machine `host` of a pair: the last number of its addresses."""
    tree = Tree(root)
    for number, function in enumerate(FUNCTIONS):
        cable = bool(function.network)
        folder = f"sys/devices/pci/{function.pci}"
        tree.write(f"{folder}/current_link_width", "4")
        tree.write(f"{folder}/iommu_group/type", "identity")
        tree.write(f"{folder}/net/{function.netdev}/ifindex", str(number))
        tree.link(f"sys/class/infiniband/{function.device}/device", f"../../../devices/pci/{function.pci}")
        tree.port(function.device, "state", "4: ACTIVE" if cable else "1: DOWN")
        tree.port(function.device, "phys_state", "5: LinkUp" if cable else "3: Disabled")
        tree.port(function.device, "rate", "200 Gb/sec (4X HDR)" if cable else "40 Gb/sec (4X QDR)")
        tree.port(function.device, "link_layer", "Ethernet")
        tree.write(f"sys/class/net/{function.netdev}/phys_port_name", function.connector)
        tree.mtu(function.netdev, 9000 if cable else 1500)
        tree.write(f"sys/class/infiniband_verbs/uverbs{number}/ibdev", function.device)
        tree.write(f"dev/infiniband/uverbs{number}", "")
    tree.addresses({function.device: f"{function.network}.{host}/24" for function in FUNCTIONS if function.network})
    tree.write("proc/self/limits", "Max locked memory         unlimited            unlimited            bytes")
    tree.write("proc/self/status", "CapEff:\t0000000000000000")
    tree.write(
        "proc/meminfo",
        f"MemTotal: {120 * GIB_IN_KIB} kB\nMemAvailable: {110 * GIB_IN_KIB} kB\nBuffers: 1024 kB\n"
        f"Cached: {8 * GIB_IN_KIB} kB\nSwapTotal: {16 * GIB_IN_KIB} kB\nSwapFree: {16 * GIB_IN_KIB} kB\n"
        "CmaTotal: 131072 kB\nCmaFree: 65536 kB",
    )
    tree.write("proc/mounts", "proc /proc proc rw 0 0\ntmpfs /dev/shm tmpfs rw,nosuid,nodev,inode64 0 0")
    tree.write("proc/cmdline", "BOOT_IMAGE=/boot/vmlinuz-6.14.0-1015-nvidia ro quiet")
    tree.write("proc/sys/kernel/osrelease", "6.14.0-1015-nvidia")
    tree.write("boot/config-6.14.0-1015-nvidia", "CONFIG_CMA=y")
    for core, most in enumerate((2_808_000, 3_900_000)):
        for name, text in (
            ("scaling_governor", "performance"),
            ("scaling_driver", "cppc_cpufreq"),
            ("scaling_max_freq", str(most)),
            ("cpuinfo_max_freq", str(most)),
        ):
            tree.write(f"sys/devices/system/cpu/cpu{core}/cpufreq/{name}", text)
    tree.write(
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build\nGCC version: 13",
    )
    tree.write("proc/driver/nvidia/gpus/000f:01:00.0/information", "Model: \t\t NVIDIA GB10\nIRQ: 400")
    tree.program("nvidia-smi", f"#!/bin/sh\ncat <<'END'\n{NVIDIA_SMI}\nEND")
    return tree


def _gids(function: Function, address: str) -> Iterator[tuple[str, str]]:
    """The entries of a port's table: link-local, then the IPv4 address, each for both versions."""
    if not function.network:
        return
    own = ipaddress.IPv6Address(f"fe80::{FUNCTIONS.index(function) + 1}").exploded
    for gid in [own] + ([_mapped(address)] if address else []):
        yield gid, "IB/RoCE v1"
        yield gid, "RoCE v2"


def _mapped(address: str) -> str:
    return ipaddress.IPv6Address(f"::ffff:{address.partition('/')[0]}").exploded


def _number(address: str) -> str:
    """As the kernel prints it: the four bytes as one number of this machine's byte order."""
    return f"{struct.unpack('=I', socket.inet_aton(address))[0]:08X}"
