"""Both ranks' counters on vLLM's `/metrics`, as `vllm_spark_*`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vllm_spark.backend.status import CounterBoard

_COUNTERS = {
    "steps": "Steps whose tokens went into the ranks' digest",
    "all_reduces": "All-reduces through the runtime",
    "all_gathers": "All-gathers through the runtime",
    "all_reduce_bytes": "Bytes that this rank gave to all-reduces",
    "all_gather_bytes": "Bytes that this rank gave to all-gathers",
    "fallbacks": "Collectives between the two ranks that went to vLLM's own path",
    "wait_seconds": "Seconds spent waiting for the peer inside collectives",
    "packet_messages": "Messages that went as flagged packets, as small ones do",
    "payload_messages": "Messages that went as payload and then a flag, as large ones do",
    "chunked_operations": "Collectives of more than one message",
    "proxy_posts": "Messages that the proxy sent",
    "rail_failures": "Times that an RDMA rail failed",
    "rail_recoveries": "Times that a failed RDMA rail came back",
    "rail_proof_failures": "Times that an RDMA rail was connected but carried no full-size message",
    "reposts": "Messages sent again because a rail failed before they were known to have arrived",
}
_GAUGES = {
    "rails_up": "RDMA rails that data goes over now; 0 without RDMA",
    "rails_held_down": "RDMA rails that failed soon after they came up, and are not used for a while",
}


class SparkCollector:
    """A prometheus_client collector that reads the engine's counter board when it is scraped.

    Args:
        board: of the engine; may be replaced by that of the next one.
    """

    def __init__(self, board: CounterBoard) -> None:
        self.board = board

    def collect(self) -> Iterator[Any]:
        """Yields one family per counter and gauge, with a sample per rank."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        records = list(self.board.read())
        for field, description in _COUNTERS.items():
            family = CounterMetricFamily(f"vllm_spark_{field}", description, labels=["rank"])
            for record in records:
                family.add_metric([str(record.rank)], getattr(record, field))
            yield family
        for field, description in _GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm_spark_{field}", description, labels=["rank"])
            for record in records:
                gauge.add_metric([str(record.rank)], getattr(record, field))
            yield gauge
        digest = GaugeMetricFamily(
            "vllm_spark_token_digest",
            "Rolling digest of every sampled token (48 of its bits); the same on both ranks after the same steps",
            labels=["rank"],
        )
        for record in records:
            # 48 bits, because a Prometheus value is a float64.
            digest.add_metric([str(record.rank)], int(record.digest[:12] or "0", 16))
        yield digest


_collector: SparkCollector | None = None
"""Of this process; reads the board of the last engine that it started, or that its API server works for."""

_announced: CounterBoard | None = None
"""The board that this process made for the last engine that it started."""


def publish_counters() -> None:
    """Opens a counter board for the engine that this process is about to start, and exports it.

    Every engine has a board of its own: what an earlier one left says nothing about the next one.
    """
    global _announced
    before, _announced = _announced, CounterBoard.create()
    _export(_announced)
    if before is not None:
        before.withdraw()


def share_counters() -> None:
    """Exports the board of an engine that another process has started: this one is one of several API servers."""
    _export(CounterBoard.from_environment())


def _export(board: CounterBoard) -> None:
    global _collector
    if _collector is not None:
        _collector.board = board
        return
    from prometheus_client import REGISTRY

    _collector = SparkCollector(board)
    REGISTRY.register(_collector)


def serve_shared_metrics(app: Any) -> None:
    """Answers `/metrics` of one of several API servers, before vLLM's own route for it is added.

    prometheus_client shares the metrics of several processes as files, and vLLM's route then reads these files alone.
    This one reads the board too. Does nothing where vLLM's route shows the registry of its own process.

    Args:
        app: the Starlette application of the API server, without a route for `/metrics`.
    """
    if _collector is None or "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector
    from starlette.responses import Response

    def metrics(_: Any) -> Response:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # adds itself
        registry.register(_collector)
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.add_route("/metrics", metrics, include_in_schema=False)
