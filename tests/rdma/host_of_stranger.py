"""Rank 0 for tests/rdma/stranger.py: our runtime, which does not know that its peer is another implementation.

python -m tests.rdma.host_of_stranger HOST PORT OPERATIONS
"""

from __future__ import annotations

import json
import logging
import sys

import numpy as np

from tests.rdma.exercise import meet
from vllm_spark import _native
from vllm_spark.collective import Runtime, RuntimeOptions


def main(host: str, port: int, rounds: list[int]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    peer = meet(0, host, port, 120)
    options = RuntimeOptions(
        transport="verbs", rails=("rxe0",), slot_bytes=1 << 16, timeout_s=120.0, rail_timeout_s=4.0
    )
    runtime = Runtime.connect(0, 2, peer.exchange, options, announce=peer.announce)
    peer.watch(runtime)
    done = 0
    for operations in rounds:
        for operation in range(operations):
            done += 1
            size = 1 + operation * 977 % 3000
            mine = np.full(size, 0.5 * done, dtype=np.float32)
            total = np.empty_like(mine)
            runtime._native.all_reduce(mine.ctypes.data, total.ctypes.data, size, _native.DType.FLOAT32)
            wanted = mine + (done + np.arange(size) % 7).astype(np.float32)
            assert total.tobytes() == wanted.tobytes(), f"operation {done} of {size} numbers"
    counters = runtime.counters()
    print(json.dumps({"done": done, "failures": counters.rail_failures, "recoveries": counters.rail_recoveries}))
    runtime.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(operations) for operations in sys.argv[3:]])
