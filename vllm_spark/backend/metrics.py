"""Both ranks' counters on vLLM's `/metrics`, as `vllm_spark_*`."""

from __future__ import annotations

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
    """A prometheus_client collector that reads the engine's counter board when it is scraped."""

    def __init__(self, board: CounterBoard) -> None:
        self._board = board

    def collect(self) -> Iterator[Any]:
        """Yields one family per counter and gauge, with a sample per rank."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        records = list(self._board.read())
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


_board: CounterBoard | None = None


def publish_counters() -> None:
    """Opens a counter board for the engine that is about to start, and exports it from this process, once."""
    global _board
    if _board is not None:
        return
    from prometheus_client import REGISTRY

    _board = CounterBoard.create()
    REGISTRY.register(SparkCollector(_board))
