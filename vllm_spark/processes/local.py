"""Environment and ports for two ranks on one machine, for the demo, the benchmarks and the tests."""

from __future__ import annotations

import socket
from contextlib import ExitStack

LOOPBACK = "127.0.0.1"

CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # `auto` fails with two workers on one NUMA node
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Variables with which two small ranks of vLLM's CPU build can share one machine; the KV cache is 1 GiB for each."""


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback address on which nothing listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for open_socket in sockets:
            open_socket.bind((LOOPBACK, 0))
        return [int(open_socket.getsockname()[1]) for open_socket in sockets]
