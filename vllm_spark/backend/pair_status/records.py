"""What is known of a pair that serves, as records: facts, which stay, and readings, which change."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field, FiniteFloat

from vllm_spark.ranks import RANKS

_YEAR_10000 = 253_402_300_800  # seconds since 1970; later dates cannot be shown


@dataclasses.dataclass(frozen=True)
class RailFacts:
    """One rank's end of a rail.

    Attributes:
        device: name of the RDMA device.
        port: of the device.
        rate: of the port's link, as `200 Gb/s`; empty if it is not known.
        packet_bytes: payload of one RDMA packet.
    """

    device: str
    port: int
    rate: str
    packet_bytes: int


@dataclasses.dataclass(frozen=True)
class RankFacts:
    """One rank, once its half of the model is loaded. Sizes are bytes.

    Attributes:
        rank: its number.
        host: its machine.
        process: its process id there.
        device: name of the GPU, or `cpu`.
        versions: of the packages, by name.
        tables: names of the kernels' tables in use, each with its origin.
        rails: its ends of the rails.
        weights: as vLLM measured them, drafts included; on a CPU of the model's parameters and buffers.
        kv_cache: None if it is not known.
        region: memory of the collectives.
        reserve: what the settings leave to its machine's desktop.
        memory: of the machine.
    """

    rank: Annotated[int, Field(ge=0, lt=len(RANKS))]
    host: str
    process: int
    device: str
    versions: dict[str, str]
    tables: list[str]
    rails: list[RailFacts]
    weights: int
    kv_cache: int | None
    region: int
    reserve: int
    memory: int


@dataclasses.dataclass(frozen=True)
class PairFacts:
    """A pair that has started.

    Attributes:
        model: its name.
        path: the way of the collectives' messages, such as `over loopback, direct`.
        packet_limit: bytes; larger messages use the Simple protocol.
        endpoint: where the leader listens for its follower.
        started: seconds since 1970, before the year 10000.
        ranks: both, in rank order; only the leader's if the follower did not describe itself.
    """

    model: str
    path: str
    packet_limit: int
    endpoint: str
    started: Annotated[FiniteFloat, Field(ge=0, lt=_YEAR_10000)]
    ranks: list[RankFacts]


@dataclasses.dataclass(frozen=True)
class Readings:
    """What a rank's machine measures now; None where it cannot be read.

    Attributes:
        memory_available: bytes.
        gpu_celsius, cpu_celsius: temperatures; of a processor the hottest sensor's.
        gpu_mhz, gpu_most_mhz: the GPU's clock, and the highest that it allows.
        cpu_mhz, cpu_most_mhz: the mean of the processor's cores.
    """

    memory_available: int | None = None
    gpu_celsius: FiniteFloat | None = None
    gpu_mhz: FiniteFloat | None = None
    gpu_most_mhz: FiniteFloat | None = None
    cpu_celsius: FiniteFloat | None = None
    cpu_mhz: FiniteFloat | None = None
    cpu_most_mhz: FiniteFloat | None = None
