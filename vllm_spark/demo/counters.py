"""The counters of both ranks of a pair, from the leader's `/metrics`."""

from __future__ import annotations

import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass, fields
from http.client import HTTPException

from vllm_spark.demo.programs import Server
from vllm_spark.processes.managed import ProcessError
from vllm_spark.ranks import RANKS

COUNTER_SECONDS = 15.0
"""Time limit until both ranks' counters on the leader's `/metrics` stop changing."""

REST_SECONDS = 2.0
"""Time without a change after which counters are final: longer than a rank's reporting interval."""


@dataclass(frozen=True)
class Counters:
    """The counters of one rank since its start: calls, bytes, and calls that used vLLM's own path."""

    all_reduces: int
    all_reduce_bytes: int
    all_gathers: int
    all_gather_bytes: int
    fallbacks: int


def read_counters(server: Server) -> tuple[Counters, Counters]:
    """The counters of both ranks, from the `/metrics` of an idle leader.

    A rank shows its counters some time after its work, so they are read until they stand still.

    Raises:
        ProcessError: they are not exported, or do not come to rest.
    """
    names = {field.name: f"vllm_spark_{field.name}_total" for field in fields(Counters)}
    seen: list[dict[str, int]] = []
    seen_since = time.monotonic()

    def at_rest() -> bool:
        nonlocal seen, seen_since
        samples = _samples(server.url)
        now = [samples.get(rank, {}) for rank in map(str, RANKS)]
        if now != seen:
            seen, seen_since = now, time.monotonic()
        complete = all(name in rank for rank in seen for name in names.values())
        return complete and time.monotonic() - seen_since >= REST_SECONDS

    try:
        server.process.wait_until(at_rest, COUNTER_SECONDS, "shown final counters of both ranks")
    except (OSError, HTTPException) as error:
        raise ProcessError(f"{server.process.name} does not show its metrics: {error}", server.process) from error
    first, second = (Counters(**{field: rank[name] for field, name in names.items()}) for rank in seen)
    return first, second


def _samples(url: str) -> dict[str, dict[str, int]]:
    """The samples of a server's `/metrics` that belong to a rank, by rank and name."""
    from prometheus_client.parser import text_string_to_metric_families

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    samples: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "rank" in sample.labels:
                samples[sample.labels["rank"]][sample.name] = int(sample.value)
    return samples
