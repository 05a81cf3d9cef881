"""Steps of a session's start that both ranks share: the link's interface, the collective runtime."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from typing import Any

from vllm_spark import collective
from vllm_spark.collective import Transport
from vllm_spark.collective.launch_table import LaunchTable
from vllm_spark.collective.link_model import WireFigures, load_wire_figures
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import SparkError
from vllm_spark.executor.channel.addresses import host_name, interface_of, split_rails
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.ranks import WORLD_SIZE

logger = logging.getLogger("vllm_spark")

_INTERFACE_VARIABLES = frozenset({"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"})

_EXCHANGE_TIMEOUT = 120.0  # seconds for the other side to get as far as this one in the rendezvous


@dataclasses.dataclass
class Assignment:
    """The leader's configuration for the follower's worker; sent as a pickle, after both sides agreed.

    `environment` also has the variables that vLLM itself set on the leader while it made its configuration.
    """

    vllm_config: Any
    config: SparkConfig
    launch: LaunchTable
    environment: dict[str, str]
    wire: WireFigures | None = None
    """The modelled link: only the leader has the file."""


def use_link_interface(local_address: str | None) -> LinkInterface:
    """Binds gloo, NCCL and vLLM to the link, by environment variables; variables that the user has set stay.

    vLLM would use the address of the default route: without one its ranks wait for each other at 0.0.0.0, and with one
    they listen on a network that is not the link.

    Args:
        local_address: this side's address on the link; None if there is no route to the leader.

    Returns:
        The object that restores the environment; not needed in a process that ends with its session.
    """
    interface = interface_of(local_address) if local_address else None
    values = {} if interface is None else dict.fromkeys(_INTERFACE_VARIABLES, interface)
    if local_address:
        values["VLLM_HOST_IP"] = local_address
    # NCCL's watchdog would poll the store every second for a request to dump its state.
    values["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    chosen = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(chosen)
    return LinkInterface(chosen)


class LinkInterface:
    """The variables that `use_link_interface` set in this process's environment.

    Args:
        chosen: the variables, with their values.
    """

    def __init__(self, chosen: dict[str, str]) -> None:
        self._set = chosen

    def restore(self) -> None:
        """Removes the variables. Only after the session: NCCL connects when it is first used."""
        for name, interface in self._set.items():
            if os.environ.get(name) == interface:
                del os.environ[name]
        self._set = {}


def exchange_over(connection: Connection) -> Callable[[bytes], bytes]:
    """A rendezvous' `exchange` over the rpc connection: sends this side's bytes and returns the other side's."""

    def exchange(mine: bytes) -> bytes:
        connection.send(Kind.EXCHANGE, mine, timeout=_EXCHANGE_TIMEOUT)
        return connection.expect(Kind.EXCHANGE, timeout=_EXCHANGE_TIMEOUT).payload

    return exchange


def connect_runtime(
    rank: int,
    config: SparkConfig,
    launch: LaunchTable,
    connection: Connection,
    announce: collective.Announce,
    rails: str | None,
    wire: WireFigures | None,
) -> collective.Runtime:
    """Joins both ranks' collective runtimes, for the device that vLLM uses, and makes this one the process's.

    Args:
        config: the leader's, on both ranks.
        launch: the leader's, on both ranks.
        connection: the rpc connection, for the rendezvous.
        announce: sends the runtime's announcements about its rails, at any later time.
        rails: the ports of this machine to use; None for all that reach the peer.
        wire: the leader's modelled link, on both ranks.

    Raises:
        SparkError: the two sides do not agree, or cannot reach each other's memory.
    """
    kind, launch = _for_this_device(launch)
    exchange = exchange_over(connection)
    transport = _transport(config, exchange)
    try:
        runtime = kind.connect(
            rank,
            WORLD_SIZE,
            exchange,
            runtime_options(config, launch, transport, rails, wire),
            description=f"{host_name()} (process {os.getpid()})",
            announce=announce,
        )
    except collective.CollectiveError as error:
        raise SparkError(str(error)) from None
    collective.install(runtime)
    return runtime


def _for_this_device(launch: LaunchTable) -> tuple[type[collective.Runtime], LaunchTable]:
    """The runtime for the device that vLLM uses, and the launch table that applies to it."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return collective.Runtime, LaunchTable()
    if launch.gpu not in ("", gpu := current_platform.get_device_name()):
        logger.warning(
            "The launch table was measured on a %s, and this is a %s; run here: vllm-spark bench calibrate",
            launch.gpu,
            gpu,
        )
    return collective.DeviceRuntime, launch


def modelled_wire(config: SparkConfig) -> WireFigures | None:
    """The modelled link that the settings describe; None without one. On the leader, which alone has the file.

    Raises:
        ConfigurationError: the file cannot be read, or is not a wire model.
    """
    if config.wire is not None:
        return load_wire_figures(config.wire)
    latency_us, gbytes_per_s = config.loopback_latency_us, config.loopback_gbytes_per_s
    return WireFigures.alpha_beta(latency_us, gbytes_per_s) if latency_us or gbytes_per_s else None


def runtime_options(
    config: SparkConfig, launch: LaunchTable, transport: Transport, rails: str | None, wire: WireFigures | None = None
) -> collective.RuntimeOptions:
    """The runtime's options for these settings; every value that `SparkConfig` accepts is valid there.

    Args:
        config: the leader's, on both ranks.
        launch: how kernels are launched on this device.
        transport: the transport to use, never `auto`.
        rails: the ports of this machine to use; None for all that reach the peer.
        wire: the modelled link of the transport `loopback`, if there is one.
    """
    path = "proxied" if transport == "verbs" else config.loopback_mode
    return collective.RuntimeOptions(
        transport=transport,
        loopback_mode=config.loopback_mode,
        wire=wire if transport == "loopback" else None,
        rails=split_rails(rails),
        link_timeout_s=config.link_timeout,
        rail_timeout_s=config.rail_timeout,
        traffic_class=config.traffic_class,
        service_level=config.service_level,
        slot_bytes=config.slot_kib << 10,
        packet_bytes=launch.packet_bytes(config.packet_kib, config.slot_kib, path),
        depth=config.depth,
        timeout_s=config.collective_timeout,
        launch=launch.shape_on(path),
    )


def _transport(config: SparkConfig, exchange: Callable[[bytes], bytes]) -> Transport:
    """The transport to use; `auto` is shared memory if both ranks are on one machine."""
    mine = collective.machine_identity().encode()
    same = exchange(mine) == mine  # also if not needed here: both ranks must do the same exchanges
    if config.transport != "auto":
        return config.transport
    return "loopback" if same else "verbs"


def link_tolerance(runtime: collective.Runtime | None, config: SparkConfig) -> float:
    """Seconds of silence on the channel that do not prove that the peer is lost.

    The channel may use a cable that is unplugged, or that of a failed rail while another rail works. A frozen peer
    sends no announcements over a rail either.
    """
    if runtime is None or (silence := runtime.silence) is None:
        return 0.0
    # A rail that is out is noticed when its NIC has retransmitted for long enough, up to four times its time-out.
    noticed = max(config.heartbeat_timeout, 4 * config.rail_timeout + 1)
    return config.link_timeout if runtime.link_lost or silence < noticed else 0.0
