"""All checks of one machine, and the report of them that the other machine gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from vllm_spark.config.settings import SparkConfig, split_endpoint
from vllm_spark.doctor import rdma
from vllm_spark.doctor.finding import Finding, guarded
from vllm_spark.doctor.gpu import software as gpu
from vllm_spark.doctor.gpu.reading import GB10, Gpu, find_gpu
from vllm_spark.doctor.machine import check_machine
from vllm_spark.doctor.model.files import check_files, check_files_of, only_configuration
from vllm_spark.doctor.model.memory import check_memory
from vllm_spark.doctor.model.question import ModelQuestion
from vllm_spark.doctor.network import check_firewall, check_network, check_reach, check_shared
from vllm_spark.doctor.network_path import PathProbe
from vllm_spark.doctor.rails import Rail, active, find_rails, interface_towards
from vllm_spark.doctor.rdma_mtu import check_rdma_mtu, measured_mtus
from vllm_spark.doctor.software import check_software
from vllm_spark.doctor.system import System, check_handover
from vllm_spark.executor.channel.addresses import host_name, is_loopback
from vllm_spark.executor.handshake.versions import Versions


@dataclasses.dataclass(frozen=True)
class MachineReport:
    """The report of one machine: the reply to a CHECK_REQUEST, and a part of `--json`.

    `path_probe` is a follower's part of the checks between both machines; None on the machine that asks.
    """

    host: str
    versions: Versions
    rails: list[Rail]
    findings: list[Finding]
    path_probe: PathProbe | None = None


def run_checks(
    system: System,
    config: SparkConfig,
    peer: str | None = None,
    *,
    thorough: bool = False,
    model: ModelQuestion | None = None,
) -> MachineReport:
    """Runs all checks. Never raises for what it finds.

    Args:
        system: the machine.
        config: the settings of serving or joining.
        peer: address of the other machine, if known.
        thorough: runs the remaining checks also on a machine that has neither an RDMA device nor a GPU.
        model: that is to be served; None to check none.
    """
    rails = find_rails(system)
    chip = find_gpu(system)
    findings = list(_findings(system, config, rails, chip, peer, thorough))
    if model is not None:
        findings += guarded("model", lambda: _of_model(system, config, model, chip))
    return MachineReport(host_name(), Versions.of_this_process(), rails, findings)


def is_bare(machine: MachineReport) -> bool:
    """True for a machine with neither an RDMA device nor a GPU."""
    absent = {finding.id for finding in machine.findings if finding.value == "none"}
    return not machine.rails and "gpu.driver" in absent


def _findings(
    system: System, config: SparkConfig, rails: list[Rail], chip: Gpu | None, peer: str | None, thorough: bool
) -> Iterator[Finding]:
    # Checks that depend on RDMA devices need one, and checks of rails need an active port.
    yield from [rdma.missing()] if not rails else guarded("rdma.devices", lambda: rdma.check_devices(rails))
    if active(rails):
        yield from guarded("rdma.access", lambda: [rdma.check_access(system, rails)])
        yield from guarded("rdma.gid", lambda: [rdma.check_gids(rails)])
        yield from guarded("rdma.mtu", lambda: [check_rdma_mtu(rails, measured_mtus(system, rails))])
        away = peer if peer is None or not is_loopback(peer) else None
        yield from guarded("link", lambda: check_network(system, rails, away))
    yield from [gpu.missing()] if chip is None else guarded("gpu", lambda: gpu.check_gpu(system, chip))
    port = leader_port(config)
    ways = [way for way in (config.address, peer) if way and not is_loopback(way)]
    interfaces = _interfaces(system, rails, ways)
    if interfaces and (active(rails) or not rails):
        yield from guarded("link.shared", lambda: [check_shared(system, interfaces)])
        yield from guarded("link.firewall", lambda: [check_firewall(system, port, interfaces[0])])
    if peer is not None and system.live:
        yield from guarded("link.port", lambda: [check_reach(peer, config, port)])
    if not rails and chip is None and not thorough:
        return
    secret_needed = bool(rails) or any(name and not is_loopback(name) for name in (config.address, peer))
    yield from guarded("machine", lambda: check_machine(system, config, rails))
    if chip is not None and GB10 in chip.model and active(rails):
        yield from guarded("machine.handover", lambda: [check_handover(system)])
    yield from guarded("software", lambda: check_software(config, secret_needed=secret_needed))


def _of_model(system: System, config: SparkConfig, model: ModelQuestion, chip: Gpu | None) -> Iterator[Finding]:
    if model.files is not None:
        yield check_files_of(model.files, config, sends_files=model.sends_files)
    elif model.has_files:
        yield check_files(model.name, config)
    else:
        yield only_configuration()
    yield check_memory(system, config, model, chip)


def leader_port(config: SparkConfig) -> int:
    """The leader's port."""
    return (split_endpoint(config.leader)[1] if config.leader else None) or config.port


def _interfaces(system: System, rails: list[Rail], addresses: list[str]) -> list[str]:
    """The pair's interfaces: those of `addresses` (this machine's own, or the peer's), else those of the rails."""
    named = [found for address in addresses if (found := interface_towards(system, address))]
    return list(dict.fromkeys(named or [rail.netdev for rail in active(rails) if rail.netdev]))
