"""Latency and bandwidth of RDMA writes between two machines, for each rail alone and for all rails together.

Latency is measured as by `ib_write_lat`: the machines write in turn, each after the other's write has arrived, and a
sample is half of the round trip. Bandwidth is measured as by `ib_write_bw`: writes in one direction, posted back to
back with a bounded number outstanding. Both use queue pairs that are configured as the transport's
(csrc/transport/wire_probe.hpp). Over all rails, a ping is split as the transport splits a payload, and
bandwidth writes alternate between the rails.

The two processes coordinate over a TLS connection (`BenchSession`), on which they exchange queue pair addresses, go
through the steps in the same order, and report failures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
import select
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from types import TracebackType
from typing import NamedTuple, TypeVar

from vllm_spark import __version__, _native
from vllm_spark.bench.connection import await_connection, open_connection
from vllm_spark.bench.statistics import machine, percentile
from vllm_spark.collective.errors import CollectiveError
from vllm_spark.collective.link_model import Bandwidth, Latency, RailWire, Wire, WireModel, fit
from vllm_spark.collective.rails import Port, Rail, pair
from vllm_spark.collective.rendezvous import LinkOffer, Ports, both_ready, swap_offers, swap_ports
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError, RefusedError, SparkError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.channel.framing import ChannelError, Connection, Frame, Kind
from vllm_spark.executor.handshake.messages import Reason, decode_frame
from vllm_spark.records import to_json

logger = logging.getLogger("vllm_spark")
KIB, MIB = 1 << 10, 1 << 20
LATENCY_SIZES = tuple(1 << power for power in range(1, 17))
BANDWIDTH_SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
MAX_DEPTH = _native.WireProbe.MAX_DEPTH
_COMMAND = "vllm-spark bench wire"
_HELLO_SECONDS = 30.0
_SEND_SECONDS = 10.0

_STEP_SECONDS = 1800.0
"""Limit for one step on the other machine; a lost machine is noticed earlier by TCP or by its rail."""

_PROGRESS_SECONDS = 60.0
"""Time without progress after which a rail has failed: longer than it takes to detect an unplugged cable."""

_STREAMS = 5
_Message = TypeVar("_Message")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured; the listening machine sends it to the other.

    Attributes:
        sizes: bytes of the messages whose latency is measured, ascending.
        samples: round trips of each size.
        bandwidth_sizes: bytes of the messages whose bandwidth is measured, ascending.
        writes: number of writes that are posted back to back, five times.
        depth: maximum number of outstanding writes on each rail.
        rail_timeout: seconds without an acknowledgement after which a rail fails.
        traffic_class, service_level: of the packets.
    """

    sizes: tuple[int, ...] = LATENCY_SIZES
    samples: int = 10_000
    bandwidth_sizes: tuple[int, ...] = BANDWIDTH_SIZES
    writes: int = 1000
    depth: int = 128
    rail_timeout: float = 0.5
    traffic_class: int = 0
    service_level: int = 0


class Step(NamedTuple):
    """One measurement: one row of the tables."""

    rails: tuple[int, ...]
    latency: bool
    bytes: int


def steps(plan: Plan, rails: int) -> Iterator[Step]:
    """The measurements in their order, which is the same on both machines."""
    together = [tuple(range(rails))] if rails > 1 else []
    for chosen in [*((rail,) for rail in range(rails)), *together]:
        yield from (Step(chosen, True, size) for size in plan.sizes)
        yield from (Step(chosen, False, size) for size in plan.bandwidth_sizes)


@dataclasses.dataclass(frozen=True)
class BenchHello:
    """The first message of each machine; only the listener sends a plan."""

    host: str
    machine: str
    plan: Plan | None = None


def measure(
    session: BenchSession,
    rank: int,
    plan: Plan | None,
    ports: Sequence[Port],
    on_start: Callable[[int], None],
    on_step: Callable[[], None],
) -> tuple[Plan, WireModel]:
    """Measures together with the other machine; returns the same plan and model on both.

    Args:
        rank: 0 on the listening machine, which sends first and takes the times; 1 on the other.
        plan: rank 0's; None on the other.
        ports: of this machine.
        on_start: called with the number of steps.
        on_step: called after each.

    Raises:
        SparkError: there is no rail between the machines, or one could not be connected.
        PeerLostError: a rail or the other machine failed.
    """
    mine = BenchHello(host_name(), machine(platform.release()), plan)
    theirs = session.handshake(mine, BenchHello)
    if (plan := plan or theirs.plan) is None:
        raise SparkError("both machines were started with --connect; start one with --listen")
    rank_0, rank_1 = (mine, theirs) if rank == 0 else (theirs, mine)
    try:
        their_ports = swap_ports(session.exchange, Ports(tuple(ports)))
        rails = pair(ports, their_ports, rank)
        their_rails = pair(their_ports, ports, 1 - rank)
        probe = _connect(session, plan, rails, theirs.host)
    except CollectiveError as error:
        raise SparkError(str(error)) from None
    names = " and ".join(f"rail {index} ({rail.device})" for index, rail in enumerate(rails))
    logger.info("Measuring with %s over %s.", theirs.host, names)
    schedule = list(steps(plan, len(rails)))
    on_start(len(schedule))
    points: dict[tuple[int, ...], tuple[list[Latency], list[Bandwidth]]] = {}
    for step in schedule:
        try:
            point = _point(probe, rank, plan, step)
        except CollectiveError as error:
            raise PeerLostError(str(error)) from None
        said = session.exchange(b"" if point is None else point.model_dump_json().encode())
        latencies, bandwidths = points.setdefault(step.rails, ([], []))
        if step.latency:
            latencies.append(point if isinstance(point, Latency) else Latency.model_validate_json(said))
        else:
            bandwidths.append(point if isinstance(point, Bandwidth) else Bandwidth.model_validate_json(said))
        on_step()
    ends = list(zip(*((rails, their_rails) if rank == 0 else (their_rails, rails)), strict=True))
    model = _model(plan, rank_0, rank_1, ends, points)
    # Both use rank 0's model, so that the dates are equal too.
    said = session.exchange(model.model_dump_json().encode())
    return plan, model if rank == 0 else WireModel.model_validate_json(said)


def _connect(session: BenchSession, plan: Plan, rails: list[Rail], peer: str) -> _native.WireProbe:
    offer, problem, probe = b"", "", None
    try:
        probe = _native.WireProbe(
            rails=[*rails],
            largest=max(*plan.sizes, *plan.bandwidth_sizes),
            timeout_s=_PROGRESS_SECONDS,
            rail_timeout_s=plan.rail_timeout,
            traffic_class=plan.traffic_class,
            service_level=plan.service_level,
            attend=session.check_peer,
        )
        offer = probe.offer()
    except CollectiveError as error:
        problem = str(error)
    theirs = swap_offers(session.exchange, LinkOffer(offer, problem))
    assert probe is not None, "swap_offers raises where there is none"
    try:
        probe.connect(theirs, peer)
    except CollectiveError as error:
        problem = str(error)
    both_ready(session.exchange, problem)
    return probe


def _point(probe: _native.WireProbe, rank: int, plan: Plan, step: Step) -> Latency | Bandwidth | None:
    """Runs this machine's part of a step; returns the result on the rank that measured it."""
    rails = list(step.rails)
    if step.latency:
        warm_up = max(10, plan.samples // 10)
        if rank == 1:
            probe.answer(rails, step.bytes, warm_up + plan.samples)
            return None
        times = probe.ping(rails, step.bytes, warm_up + plan.samples)[warm_up:]
        return Latency(
            bytes=step.bytes,
            minimum=min(times),
            median=statistics.median(times),
            p99=percentile(times, 0.99),
            p999=percentile(times, 0.999),
        )
    if rank == 1:
        return None  # the writes need no action of the receiver
    probe.stream(rails, step.bytes, min(plan.depth, plan.writes), plan.depth)  # to warm up
    rates = [
        step.bytes * plan.writes / probe.stream(rails, step.bytes, plan.writes, plan.depth) / 1e9
        for _ in range(_STREAMS)
    ]
    return Bandwidth(bytes=step.bytes, median=statistics.median(rates), best=max(rates))


def _model(
    plan: Plan,
    rank_0: BenchHello,
    rank_1: BenchHello,
    ends: Sequence[tuple[Rail, Rail]],
    points: dict[tuple[int, ...], tuple[list[Latency], list[Bandwidth]]],
) -> WireModel:
    def wire(rails: tuple[int, ...]) -> dict[str, object]:
        latency, bandwidth = points[rails]
        return {"latency": tuple(latency), "bandwidth": tuple(bandwidth), "fit": fit(latency, bandwidth)}

    return WireModel(
        provenance=f"vllm-spark bench wire between {rank_0.host} and {rank_1.host}: RDMA writes from CPU memory to CPU "
        f"memory, latency as half of {plan.samples} round trips of each size, bandwidth from {rank_0.host} to "
        f"{rank_1.host} with {plan.depth} of {plan.writes} writes under way",
        measured_at=datetime.now(timezone.utc).replace(microsecond=0),
        machines=(f"{rank_0.host}: {rank_0.machine}", f"{rank_1.host}: {rank_1.machine}"),
        versions={"vllm_spark": __version__, "python": platform.python_version()},
        rails=tuple(
            RailWire.model_validate(
                {
                    **wire((index,)),
                    "devices": tuple(f"{end.device}:{end.port}" for end in both),
                    "mtu": min(end.mtu for end in both),
                }
            )
            for index, both in enumerate(ends)
        ),
        total=Wire.model_validate(wire(tuple(range(len(ends))))),
    )


class BenchSession:
    """The connection between the two machines of a measurement.

    A context manager: an exception inside is reported to the other machine.
    """

    def __init__(self, connection: Connection, other: str) -> None:
        self._connection, self._other = connection, other
        self._received: list[Frame] = []

    @classmethod
    def listen(cls, config: SparkConfig, patience: float) -> BenchSession:
        """Waits at most `patience` seconds for the other machine.

        Raises:
            SparkError: it did not connect, has other versions or another secret, or a setting is invalid.
        """
        return cls(await_connection(config, patience, _COMMAND), f"{_COMMAND} --connect")

    @classmethod
    def connect(cls, config: SparkConfig, patience: float) -> BenchSession:
        """Tries for at most `patience` seconds to connect to the machine that listens at `config.leader`.

        Raises:
            SparkError: nothing listens there, it has other versions or another secret, or a setting is invalid.
        """
        return cls(open_connection(config, patience, _COMMAND), f"{_COMMAND} --listen")

    def handshake(self, mine: _Message, kind: type[_Message]) -> _Message:
        """Sends the first message, and returns the other machine's.

        Raises:
            RefusedError: the other program is not `vllm-spark bench wire`, but for example `vllm-spark join`.
        """
        try:
            self._connection.send(Kind.EXCHANGE, to_json(mine), timeout=_SEND_SECONDS)
            return decode_frame(self._connection.expect(Kind.EXCHANGE, timeout=_HELLO_SECONDS), kind)
        except ChannelError as error:
            raise RefusedError(
                f"{error}; run {self._other} there, and neither vllm-spark join nor vllm serve meanwhile"
            ) from None

    def exchange(self, mine: bytes) -> bytes:
        """Sends `mine` and returns the other machine's message for the same step.

        Raises:
            PeerLostError: the other machine is lost, or has failed.
        """
        self.check_peer()  # reads a failure first: its sender closes the connection, so that sending would fail
        self._connection.send(Kind.EXCHANGE, mine, timeout=_SEND_SECONDS)
        frame = self._received.pop() if self._received else self._receive()
        return frame.payload

    def check_peer(self) -> None:
        """Receives a message of the other machine, if there is one: it may report a failure.

        Raises:
            PeerLostError: the other machine is lost, or has failed.
        """
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        if self._connection.pending or poll.poll(0):
            self._received.append(self._receive(_SEND_SECONDS))  # the rest of a message that has begun to arrive

    def _receive(self, timeout: float = _STEP_SECONDS) -> Frame:
        frame = self._connection.expect(Kind.EXCHANGE, Kind.FAILURE, timeout=timeout)
        if frame.kind is Kind.FAILURE:
            raise PeerLostError(f"{self._connection.peer} failed: {decode_frame(frame, Reason).sentence}")
        return frame

    def __enter__(self) -> BenchSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            sentence = "it was stopped there" if isinstance(error, KeyboardInterrupt) else str(error)
            with contextlib.suppress(PeerLostError):
                self._connection.send(Kind.FAILURE, to_json(Reason(sentence)), timeout=_SEND_SECONDS)
        self._connection.close()
