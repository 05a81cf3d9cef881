"""The route of the leader's HTTP server by which `vllm-spark trace` has steps recorded."""

from __future__ import annotations

from typing import Any

from vllm_spark.backend.metrics import exported_status
from vllm_spark.errors import described
from vllm_spark.executor.rpc import TRACE
from vllm_spark.recording.records import PATH

_LARGEST = 4096  # bytes of a request


def serve_traces(app: Any) -> None:
    """Answers `PATH`, if this process serves a pair; whether traces are permitted, its engine decides.

    Args:
        app: the Starlette application of the API server; `app.state.engine_client` is its engine once it serves.
    """
    if exported_status() is None:
        return
    from starlette.responses import Response

    async def trace(request: Any) -> Response:
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > _LARGEST:
                return Response("the request is too long", 413, media_type="text/plain")
        try:
            answers = await request.app.state.engine_client.collective_rpc(TRACE, args=(body.decode(errors="replace"),))
        except Exception as error:
            return Response(f"the engine has failed: {described(error)}", 503, media_type="text/plain")
        return Response(answers[0], media_type="application/json")

    app.add_route(PATH, trace, methods=["POST"], include_in_schema=False)
