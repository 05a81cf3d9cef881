"""vLLM's development endpoints, and the worker extension of tests that a request to them can call."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from .servers import Server

EXTENSION = ("--worker-extension-cls", "tests.serve.worker_extension.Saboteur")
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def call(server: Server, method: str, *args: Any) -> list[Any]:
    """Runs a method of the worker extension on both ranks and returns both results, in rank order."""
    body = json.dumps({"method": method, "args": args}).encode()
    request = urllib.request.Request(f"{server.url}/collective_rpc", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        results: list[Any] = json.loads(response.read())["results"]
    return results


def post(server: Server, path: str, body: Any = None) -> int:
    """Posts JSON to one of vLLM's own endpoints and returns the status."""
    data = b"" if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
