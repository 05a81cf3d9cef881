"""Shows the status of a pair: as a table on a terminal, else as lines.

The start table has what stays as it is; with `now` it also has what the pair does now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_spark.backend.pair_status.records import PairFacts, RankFacts, Readings
from vllm_spark.backend.pair_status.report import StatusReport
from vllm_spark.backend.status import RankCounters
from vllm_spark.memory.scopes import gib
from vllm_spark.ranks import FOLLOWER_RANK, LEADER_RANK, RANKS

UNKNOWN = "not known"
_ROLES = {LEADER_RANK: "leader", FOLLOWER_RANK: "follower"}
_MEGA, _GIGA = 1e6, 1e9
_MOST_TABLES = 4


class Row(NamedTuple):
    """A line of the table: a label, and a text for each machine or one for the pair."""

    label: str
    texts: tuple[str, ...]
    of_machines: bool = False


def show_table(report: StatusReport, console: Console, *, now: bool) -> None:
    """Prints the table.

    Args:
        report: what is known; its facts must not be None.
        console: where to print.
        now: whether to show what the pair does now.
    """
    head, *rows = _rows(report, now=now)
    width = max(len(row.label) for row in rows)
    machines = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    machines.add_column(head.label, min_width=width)
    for text in head.texts:
        machines.add_column(Text(text), overflow="fold", ratio=1)
    pair = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    pair.add_column(min_width=width)
    pair.add_column(overflow="fold")
    for row in rows:
        table = machines if row.of_machines else pair
        table.add_row(Text(row.label, style="bold"), *map(Text, row.texts))
    for part in (Text(_title(report), style="bold"), machines, pair):
        console.print(part)


def lines(report: StatusReport, *, now: bool) -> Iterator[str]:
    """The same as `show_table` as lines, without a full stop."""
    yield _title(report)
    for row in _rows(report, now=now):
        yield f"{row.label}: " + " | ".join(dict.fromkeys(row.texts))


def _title(report: StatusReport) -> str:
    facts = _facts(report)
    hosts = " and ".join(f"{rank.host} ({_ROLES[rank.rank]})" for rank in facts.ranks)
    return _plain(f"{facts.model} is served by {hosts}")


def _rows(report: StatusReport, *, now: bool) -> Iterator[Row]:
    facts = _facts(report)
    ranks, counters = facts.ranks, {each.rank: each for each in report.counters}
    readings = {rank: report.readings[rank] for rank in RANKS if rank < len(report.readings)}

    def row(label: str, text: Callable[[RankFacts], str]) -> Row:
        return Row(label, tuple(_plain(text(rank)) for rank in ranks), of_machines=True)

    def counted(label: str, text: Callable[[RankCounters], str]) -> Row:
        return row(label, lambda rank: text(counters[rank.rank]) if rank.rank in counters else UNKNOWN)

    yield row("machine", lambda rank: f"{rank.host} ({_ROLES[rank.rank]}, process {rank.process})")
    yield row("device", lambda rank: rank.device)
    yield row("versions", lambda rank: ", ".join(f"{name} {version}" for name, version in rank.versions.items()))
    yield row("memory (GiB)", _memory)
    yield row("kernel tables", _tables)
    if any(rank.rails for rank in ranks):
        yield row("rails", _rails)
    if now:
        yield row("available now", lambda rank: _available(rank, readings.get(rank.rank)))
        yield row("GPU", lambda rank: _device_now(readings.get(rank.rank), "gpu"))
        yield row("processor", lambda rank: _device_now(readings.get(rank.rank), "cpu"))
        yield counted("steps", lambda each: f"{each.steps:,}")
        yield counted("collectives", _collectives)
        yield counted("waited", lambda each: f"{each.wait_seconds:.1f} s for the other rank")
        yield counted("rails now", _rails_now)
        yield counted("fall-backs", lambda each: f"{each.fallbacks:,} by vLLM's own path")
        yield Row("serves since", (_since(facts.started),))
    yield Row("transport", (_plain(facts.path),))
    limit = f"LL up to {facts.packet_limit:,} bytes, Simple above"
    packets = {rail.packet_bytes for rank in ranks for rail in rank.rails}
    rdma = f"; RDMA packets of {min(packets):,} bytes" if packets else ""
    yield Row("protocol", (limit + rdma,))
    yield Row("ports", (_plain(f"follower at {facts.endpoint}, clients at {report.clients}"),))
    yield Row("is it used", (_use(facts, list(counters.values())),))
    if report.failure is not None:
        yield Row("failed", (_plain(report.failure),))


def _facts(report: StatusReport) -> PairFacts:
    assert report.facts is not None, "the caller shows a pair that has started"
    return report.facts


def _memory(rank: RankFacts) -> str:
    kv_cache = UNKNOWN if rank.kv_cache is None else gib(rank.kv_cache)
    return (
        f"weights {gib(rank.weights)}, KV cache {kv_cache}, region {gib(rank.region)}, desktop {gib(rank.reserve)} of "
        f"{gib(rank.memory)}"
    )


def _tables(rank: RankFacts) -> str:
    more = len(rank.tables) - _MOST_TABLES
    names = [*rank.tables[:_MOST_TABLES], *([f"and {more} more"] if more > 0 else [])]
    return ", ".join(names) or "none, vLLM's own choice"


def _rails(rank: RankFacts) -> str:
    return ", ".join(f"{rail.device}:{rail.port} {rail.rate or f'rate {UNKNOWN}'}" for rail in rank.rails)


def _available(rank: RankFacts, readings: Readings | None) -> str:
    if readings is None or readings.memory_available is None:
        return UNKNOWN
    return f"{gib(readings.memory_available)} of {gib(rank.memory)} GiB"


def _device_now(readings: Readings | None, kind: str) -> str:
    """Temperature and clock of `gpu` or `cpu`."""
    celsius, clock, most = (getattr(readings, f"{kind}_{name}", None) for name in ("celsius", "mhz", "most_mhz"))
    if celsius is None and clock is None:
        return UNKNOWN
    temperature = f"temperature {UNKNOWN}" if celsius is None else f"{celsius:.0f} °C"
    if clock is None:
        return f"{temperature}, clock {UNKNOWN}"
    return f"{temperature}, {clock:,.0f}" + ("" if most is None else f" of {most:,.0f}") + " MHz"


def _collectives(counters: RankCounters) -> str:
    return (
        f"{counters.all_reduces:,} all-reduces ({_size(counters.all_reduce_bytes)}), "
        f"{counters.all_gathers:,} all-gathers ({_size(counters.all_gather_bytes)})"
    )


def _rails_now(counters: RankCounters) -> str:
    if not counters.rail_posts:
        return "none"
    held = f", {counters.rails_held_down} held down" if counters.rails_held_down else ""
    return (
        f"{counters.rails_up} up{held}; failed {counters.rail_failures:,} times, recovered "
        f"{counters.rail_recoveries:,}; {counters.reposts:,} messages sent again"
    )


def _use(facts: PairFacts, counters: list[RankCounters]) -> str:
    """Whether collectives go by this project, in one line."""
    collectives = [each.all_reduces + each.all_gathers for each in counters]
    fallbacks = sum(each.fallbacks for each in counters)
    if not collectives or not all(collectives):
        return "no: vLLM's own path is used" if fallbacks else "not yet: no collective has run"
    done = f"{min(collectives):,} collectives of each rank went {facts.path}"
    if fallbacks:
        return _plain(f"in part: {done}, and {fallbacks:,} took vLLM's own path")
    return _plain(f"yes: {done}, and none took vLLM's own path")


def _since(started: float) -> str:
    passed = int(max(0.0, time.time() - started))
    hours, minutes = divmod(passed // 60, 60)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(started))} ({hours} h {minutes:02d} min)"


def _size(count: int) -> str:
    return f"{count / _GIGA:,.1f} GB" if count >= _GIGA else f"{count / _MEGA:,.1f} MB"


def _plain(text: str) -> str:
    """The text without control characters: parts of it come from the other machine."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
