"""Both ranks' counters on vLLM's `/metrics`, as `vllm_spark_*`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vllm_spark.backend.status import EngineStatus

_COUNTERS = {
    "steps": "Steps whose tokens are in the ranks' digest",
    "all_reduces": "All-reduces through the runtime",
    "all_gathers": "All-gathers through the runtime",
    "all_reduce_bytes": "Bytes of this rank's inputs to all-reduces",
    "all_gather_bytes": "Bytes of this rank's inputs to all-gathers",
    "fallbacks": "Collectives between the two ranks that used vLLM's own path",
    "wait_seconds": "Seconds spent waiting for the peer inside collectives",
    "packet_messages": "Messages sent with the LL protocol (flag in every packet), as small ones are",
    "payload_messages": "Messages sent with the Simple protocol (payload, then flag), as large ones are",
    "chunked_operations": "Collectives of more than one message",
    "proxy_posts": "Messages that the proxy sent",
    "rail_failures": "Times that an RDMA rail failed",
    "rail_recoveries": "Times that a failed RDMA rail recovered",
    "rail_proof_failures": "Times that an RDMA rail was connected but carried no full-size message",
    "reposts": "Messages sent again because a rail failed before they were known to have arrived",
}
_RAIL_COUNTERS = {
    "rail_posts": "Messages sent over an RDMA rail, or parts of one",
    "rail_bytes": "Bytes of these messages: of payloads, or of packets with their flags",
    "rail_doorbells": "Times that the proxy rang a rail's doorbell, once for all that it had found staged in one look",
}
"""By rank and rail."""
_GAUGES = {
    "rails_up": "RDMA rails in use for data now, or those of a modelled link; 0 without either",
    "rails_held_down": "RDMA rails in hold-down: they failed soon after they came up, and are not used for a while",
}


class SparkCollector:
    """A prometheus_client collector that reads the engine's status when it is scraped.

    Args:
        status: of the engine; may be replaced by that of the next engine.
    """

    def __init__(self, status: EngineStatus) -> None:
        self.status = status

    def collect(self) -> Iterator[Any]:
        """Yields one family per counter and gauge, with a sample per rank."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        records = list(self.status.read())
        for field, description in _COUNTERS.items():
            family = CounterMetricFamily(f"vllm_spark_{field}", description, labels=["rank"])
            for record in records:
                family.add_metric([str(record.rank)], getattr(record, field))
            yield family
        for field, description in _RAIL_COUNTERS.items():
            family = CounterMetricFamily(f"vllm_spark_{field}", description, labels=["rank", "rail"])
            for record in records:
                for rail, value in enumerate(getattr(record, field)):
                    family.add_metric([str(record.rank), str(rail)], value)
            yield family
        for field, description in _GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm_spark_{field}", description, labels=["rank"])
            for record in records:
                gauge.add_metric([str(record.rank)], getattr(record, field))
            yield gauge
        digest = GaugeMetricFamily(
            "vllm_spark_token_digest",
            "Rolling digest of all sampled and drafted tokens (48 of its bits); both ranks have the same after a step",
            labels=["rank"],
        )
        for record in records:
            # 48 bits, because a Prometheus value is a float64.
            digest.add_metric([str(record.rank)], int(record.digest[:12] or "0", 16))
        yield digest


_collector: SparkCollector | None = None
"""The collector of this process; reads the status of the last engine that it started, or that its API server uses."""

_published: EngineStatus | None = None
"""The status that this process created for the last engine that it started."""


def publish_counters() -> None:
    """Creates the status for the engine that this process is about to start, and exports its counters.

    Every engine has its own: the counters of an earlier one do not describe the next one.
    """
    global _published
    before, _published = _published, EngineStatus.create()
    _export(_published)
    if before is not None:
        before.unpublish()


def exported_status() -> EngineStatus | None:
    """The status whose counters this process exports; None without one."""
    return None if _collector is None else _collector.status


def share_counters() -> None:
    """Exports the counters of an engine that another process started: this one is one of several API servers."""
    _export(EngineStatus.from_environment())


def _export(status: EngineStatus) -> None:
    global _collector
    if _collector is not None:
        _collector.status = status
        return
    from prometheus_client import REGISTRY

    _collector = SparkCollector(status)
    REGISTRY.register(_collector)


def serve_shared_metrics(app: Any) -> None:
    """Answers `/metrics` of one of several API servers, before vLLM's own route for it is added.

    prometheus_client shares the metrics of several processes as files, and vLLM's route then reads these files alone.
    This route reads the engine's status too. Does nothing where vLLM's route shows the registry of its own process.

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
