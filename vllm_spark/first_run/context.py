"""What the steps of a first run share: the plan, both machines, their rails, and how a collective runtime is opened."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from vllm_spark.collective import DeviceRuntime, Runtime, RuntimeOptions
from vllm_spark.collective.launch_table import LaunchTable
from vllm_spark.collective.rails import Port, Rail
from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.checks import MachineReport
from vllm_spark.doctor.system import System
from vllm_spark.executor.bootstrap import runtime_options
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.channel.framing import ChannelError
from vllm_spark.first_run.peer import Peer
from vllm_spark.ranks import WORLD_SIZE
from vllm_spark.records import RecordError, from_json, to_json

COLLECTIVE_SECONDS = 60.0
"""Limit for one collective: more than a link may be out, and less than serving waits."""

_Message = TypeVar("_Message")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run; the listening machine sends it to the other.

    Attributes:
        collectives: number of random collectives; None for the default of the device.
        pull: whether the user is asked to pull each cable.
        rail_timeout, link_timeout, traffic_class, service_level, slot_kib, packet_kib, depth: the settings.
    """

    collectives: int | None
    pull: bool
    rail_timeout: float
    link_timeout: float
    traffic_class: int
    service_level: int
    slot_kib: int
    packet_kib: int | None
    depth: int

    @classmethod
    def of(cls, config: SparkConfig, collectives: int | None, pull: bool) -> Plan:
        """The plan of the listening machine, with its settings."""
        return cls(collectives, pull, **{name: getattr(config, name) for name in cls._settings()})

    def applied_to(self, config: SparkConfig) -> SparkConfig:
        """This machine's settings with those of the plan."""
        return config.model_copy(update={name: getattr(self, name) for name in self._settings()})

    @classmethod
    def _settings(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.name not in ("collectives", "pull")]


@dataclasses.dataclass(frozen=True)
class Greeting:
    """The first message of each machine; only the listening one sends a plan."""

    first_run_host: str
    has_gpu: bool
    gpu: str
    plan: Plan | None = None


@dataclasses.dataclass(frozen=True)
class _Meeting:
    """A message of `Context.meet`; its field distinguishes it from other messages."""

    here: bool


@dataclasses.dataclass
class Context:
    """The state of a run on this machine.

    Attributes:
        rank: 0 on the listening machine.
        device: `cuda` if both machines have a GPU, else `cpu`.
        limits_apply: whether both are GB10 machines, so that figures are compared with what their network cards reach.
        note: prints a line for the user while a step runs.
        ports: RDMA ports of this machine; set by the step `machine`.
        rails: this machine's ends of the rails; set by the step `machine`.
        machine: the doctor's report of this machine; set by the step `machine`.
    """

    rank: int
    plan: Plan
    config: SparkConfig
    peer: Peer
    system: System
    device: str
    limits_apply: bool
    note: Callable[[str], None]
    ports: list[Port] = dataclasses.field(default_factory=list)
    rails: list[Rail] = dataclasses.field(default_factory=list)
    machine: MachineReport | None = None

    @property
    def kind(self) -> type[Runtime]:
        """The runtime for the device."""
        return DeviceRuntime if self.device == "cuda" else Runtime

    @property
    def options(self) -> RuntimeOptions:
        """The options of the runtime, as serving would have them."""
        options = runtime_options(self.config, LaunchTable(), "verbs", self.config.rails)
        return replace(options, timeout_s=min(options.timeout_s, COLLECTIVE_SECONDS))

    def rail_name(self, index: int) -> str:
        """`rail 1 (mlx5_1)`."""
        return f"rail {index} ({self.rails[index].device})"

    @contextlib.contextmanager
    def runtime(self, **changed: int) -> Iterator[Runtime]:
        """A runtime that is connected to the other machine's.

        Args:
            changed: options that differ from those of serving.

        Raises:
            CollectiveError: it cannot be connected.
        """
        options = replace(self.options, **changed)  # type: ignore[arg-type]
        runtime = self.kind.connect(
            self.rank,
            WORLD_SIZE,
            self.peer.exchange,
            options,
            description=f"{host_name()} (process {os.getpid()})",
            announce=self.peer.begin_runtime(),
        )
        self.peer.watch(runtime)
        try:
            yield runtime
        finally:
            self.peer.unwatch()
            runtime.close()

    def meet(self) -> None:
        """Waits until the other machine is at the same place; raises as `swap`."""
        self.swap(_Meeting(True))

    def swap(self, mine: _Message) -> _Message:
        """Sends a record, and returns the other machine's record of the same type.

        Raises:
            PeerLostError: the other machine has failed or is lost, or sent something else.
        """
        try:
            return from_json(self.peer.exchange(to_json(mine)), type(mine))
        except RecordError as error:
            raise ChannelError(f"{self.peer.name} sent an unexpected message ({error})") from None
