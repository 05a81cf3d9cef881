"""The MTU of RDMA packets of the ports, from pyverbs if it is installed, else from the native module."""

from __future__ import annotations

from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.rails import Rail, active
from vllm_spark.doctor.system import System

BEST = 4096
_OVERHEAD = 96  # bytes of a RoCE v2 packet besides its payload, as Linux reckons
MTU_COSTS = (
    "Messages are cut into RDMA packets of at most this many bytes of payload, 4096 at best. What an MTU of 1500, "
    "which is 1024 bytes, costs on two GB10 was reported between 5 % of an all-reduce (NVIDIA/dgx-spark-playbooks, "
    "pull request 103) and 2.7 times."
)


def rdma_mtu(interface_mtu: int) -> int:
    """The largest RDMA MTU that fits into an interface's MTU, in bytes; 0 if none does."""
    return max((size for size in (256, 512, 1024, 2048, BEST) if size + _OVERHEAD <= interface_mtu), default=0)


def measured_mtus(system: System, rails: list[Rail]) -> dict[str, int]:
    """The RDMA MTU of each active port in bytes, by the rail's name; empty if it cannot be read."""
    up = active(rails)
    return (_from_pyverbs(up) or _from_native(up)) if system.live else {}


def check_rdma_mtu(rails: list[Rail], measured: dict[str, int]) -> Finding:
    """The finding about the MTU of the active ports, as measured by `measured_mtus`."""
    title = "RDMA MTU in use"
    up = active(rails)
    if not measured:
        fits = ", ".join(f"{rail.name} {rdma_mtu(rail.mtu)}" for rail in up if rail.mtu)
        return Finding(
            "rdma.mtu",
            title,
            "unknown",
            "",
            "What the ports use could not be read: pyverbs is not installed here, and libibverbs did not answer."
            + (f" The interfaces' MTU allows {fits} bytes." if fits else ""),
            "sudo apt install python3-pyverbs libibverbs1 ibverbs-providers",
        )
    value = ", ".join(f"{name} {mtu}" for name, mtu in measured.items())
    if min(measured.values()) >= BEST:
        return Finding("rdma.mtu", title, "ok", value)
    small = [rail for rail in up if measured.get(rail.name, BEST) < BEST]
    if all(measured[rail.name] == rdma_mtu(rail.mtu) for rail in small):
        return Finding("rdma.mtu", title, "note", value, "It follows from the MTU of the interfaces; see there.")
    return Finding(
        "rdma.mtu",
        title,
        "warning",
        value,
        MTU_COSTS,
        "\n".join(f"sudo ip link set dev {rail.netdev or 'INTERFACE'} mtu 9000   # on both machines" for rail in small),
    )


def _from_pyverbs(up: list[Rail]) -> dict[str, int]:
    try:
        from pyverbs.device import Context

        found = {}
        for rail in up:
            with Context(name=rail.device) as context:
                found[rail.name] = 128 << int(context.query_port(rail.port).active_mtu)
        return found
    except Exception:  # not installed, another version, no rights: each means that it cannot say
        return {}


def _from_native(up: list[Rail]) -> dict[str, int]:
    try:
        from vllm_spark import _native

        ports = {(device, number): mtu for device, number, _, _, mtu, _ in _native.rdma_ports()}
    except Exception:  # not built, no libibverbs, no rights: each means that it cannot say
        return {}
    return {rail.name: ports[rail.device, rail.port] for rail in up if (rail.device, rail.port) in ports}
