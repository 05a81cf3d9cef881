"""Shows both ranks' counters on `/metrics` of a server that has several API server processes.

Also gets the server's application once the engine is up: `engine-grace` ends its requests, it gets the routes of
`vllm-spark status` and `vllm-spark trace`, and the start table is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_spark.compat.patching import Anchor, Patch


def _replace(original: Callable[..., Any]) -> Callable[..., Any]:
    def attach_router(app: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_spark.backend.metrics import serve_shared_metrics
        from vllm_spark.backend.unfinished_requests import watch_requests
        from vllm_spark.entrypoints.pair_status import serve_status, show_start
        from vllm_spark.entrypoints.trace_route import serve_traces

        serve_shared_metrics(app)
        watch_requests(app)
        serve_status(app)
        serve_traces(app)
        show_start(app)
        return original(app, *args, **kwargs)

    return attach_router


PATCH = Patch(
    name="shared-metrics",
    anchor=Anchor("vllm.entrypoints.serve.instrumentator.metrics:attach_router"),
    reason="with several API servers /metrics shows only the files of prometheus_client, and no collector",
    feature="the start table, vllm-spark status and trace, and vllm_spark_* with --api-server-count above 1",
    fingerprints={"625ac5cf8bc8": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    replace=_replace,
    when="leading",
)
