"""The status of a pair as the leader's HTTP server reports it."""

from __future__ import annotations

import dataclasses

from vllm_spark.backend.pair_status.records import PairFacts, RankFacts, Readings
from vllm_spark.backend.status import EngineStatus, RankCounters
from vllm_spark.ranks import RANKS

PATH = "/v1/spark/status"
"""Where the leader's HTTP server answers with a `StatusReport` as JSON. Below /v1, where vLLM checks its API key."""


@dataclasses.dataclass(frozen=True)
class RankReport:
    """A rank's description of itself once it has started."""

    facts: RankFacts
    counters: RankCounters


@dataclasses.dataclass(frozen=True)
class StatusReport:
    """The status of a pair.

    Attributes:
        clients: the URL of the HTTP API.
        facts: None before the pair has started.
        counters: of the ranks that have reported any.
        readings: of both ranks; None of one that has not reported any.
        failure: why the engine failed; None if it did not.
    """

    clients: str
    facts: PairFacts | None
    counters: list[RankCounters]
    readings: list[Readings | None]
    failure: str | None = None

    @classmethod
    def of(cls, status: EngineStatus, clients: str) -> StatusReport:
        """The report of an engine, from what its ranks have recorded."""
        failure = status.failure()
        return cls(
            clients,
            status.read_facts(),
            status.read(),
            [status.read_readings(rank) for rank in RANKS],
            None if failure is None else str(failure),
        )
