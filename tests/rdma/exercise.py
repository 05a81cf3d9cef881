"""One rank of a checked exchange of random collectives; both machines of a test run this program.

Without torch, whose import takes a minute under emulation: numpy arrays go straight to the native module. The last line
printed is a JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vllm_spark import _native
from vllm_spark.collective import CollectiveError, Runtime, RuntimeOptions, SocketPeer

_NATIVE = {"float32": _native.DType.FLOAT32, "float16": _native.DType.FLOAT16, "bfloat16": _native.DType.BFLOAT16}

FAULTS = {signal.SIGUSR1, signal.SIGUSR2}
HOLD_SECONDS = 2.0
RAIL_SECONDS = 2.0
"""How long a rail repeats a packet until it gives up: longer than a busy host stops an emulated machine."""
STALL_SECONDS = 1.5
"""An operation that takes so long may have waited for a rail that repeated a packet until it gave up (soft-RoCE: 1.9 s
and more)."""
PAUSE_SECONDS = 0.05
"""A sleep that takes so much longer than it should: the machine did not run this process."""
LONGEST_SECONDS = 240.0
"""Of an exercise that goes on for what does not come."""


def widen(values: np.ndarray, dtype: str) -> np.ndarray:
    """`values` of `dtype` (bfloat16 as its bits in uint16) as float32, exactly."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `values` rounded to `dtype`, to nearest even."""
    if dtype == "float32":
        return values
    if dtype == "float16":
        return values.astype(np.float16)
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Exercise:
    """A random sequence of collectives: both ranks know both inputs, and so the result to the last bit."""

    def __init__(self, runtime: Runtime, rank: int, seed: int, largest: int) -> None:
        self._native = runtime._native
        self._rank, self._largest = rank, largest
        self._choice = random.Random(seed)
        # Drawn once: drawing is what takes longest under emulation.
        chance = np.random.default_rng(seed)
        pools = [chance.standard_normal(2 * largest, dtype=np.float32) * np.float32(100) for _ in range(2)]
        self._pools = {dtype: [narrow(pool, dtype) for pool in pools] for dtype in _NATIVE}
        self.digest = hashlib.blake2b(digest_size=16)
        self.done = 0

    def one(self, elements: int | None = None) -> None:
        """Runs and checks one collective, of float32 if `elements` are given; a wrong bit is an AssertionError."""
        choice = self._choice
        dtype = "float32" if elements is not None else choice.choice(list(_NATIVE))
        if elements is None:
            elements = int(2 ** choice.uniform(0, math.log2(self._largest)))
        at = choice.randrange(self._largest)
        inputs = [np.resize(pool[at : at + elements], elements) for pool in self._pools[dtype]]
        mine = inputs[self._rank]
        if choice.randrange(3):
            wanted = narrow(widen(inputs[0], dtype) + widen(inputs[1], dtype), dtype)
            result = np.full_like(mine, 77)
            self._native.all_reduce(mine.ctypes.data, result.ctypes.data, elements, _NATIVE[dtype])
        else:
            rows = choice.choice((1, 2, 3)) if elements % 6 == 0 else 1
            parts = [part.reshape(rows, -1) for part in inputs]
            wanted = np.concatenate(parts, axis=1)
            result = np.full_like(wanted, 77)
            self._native.all_gather(mine.ctypes.data, result.ctypes.data, rows, mine.nbytes // rows)
        assert result.tobytes() == wanted.tobytes(), f"operation {self.done}: {dtype}, {elements} elements differ"
        self.digest.update(result.tobytes())
        self.done += 1


class Pauses:
    """The time in which the machine did not run this process, measured by a thread that sleeps 5 ms at a time.

    A busy host stops an emulated machine for seconds, and a busy machine a process. An operation waits for that too.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        threading.Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(0.005)
            now = time.monotonic()
            if now - before > PAUSE_SECONDS:
                self.seconds += now - before
            before = now


def longest_wait(reports: Iterable[Mapping[str, Any]]) -> float:
    """Seconds of the longest operation of both ranks, less those in which a machine did not run its rank."""
    both = list(reports)
    return float(max(report["longest"] for report in both) - sum(report["paused"] for report in both))


def meet(rank: int, host: str, port: int, timeout: float) -> SocketPeer:
    """Rank 0 listens at `host`:`port`, rank 1 connects, whoever comes first."""
    if rank == 0:
        with socket.create_server((host, port)) as server:
            server.settimeout(timeout)
            return SocketPeer(server.accept()[0])
    end = time.monotonic() + timeout
    while True:
        with contextlib.suppress(OSError):
            return SocketPeer(socket.create_connection((host, port), timeout=2))
        if time.monotonic() > end:
            raise SystemExit(f"nobody listens at {host}:{port}")
        time.sleep(0.1)


def fail_on_signals(runtime: Runtime) -> None:
    """Faults that only the process itself can cause: SIGUSR1 breaks rail 0's queue pair, SIGUSR2 stops the proxy."""
    while True:
        if signal.sigwait(FAULTS) == signal.SIGUSR1:
            runtime._native.break_rail(0)
            print("broken", flush=True)
        else:
            runtime._native.hold_proxy(True)
            time.sleep(HOLD_SECONDS)
            runtime._native.hold_proxy(False)
            print("held", flush=True)


def both_are_done(runtime: Runtime, recoveries: int, seconds: float, started: float) -> bool:
    """Whether so many rails have come back, or never will, and so much time has passed; the same on both ranks.

    They must stop after the same operation.
    """
    if not recoveries and not seconds:
        return True
    passed = time.monotonic() - started
    enough = passed >= LONGEST_SECONDS or (passed >= seconds and runtime.counters().rail_recoveries >= recoveries)
    mine = np.array([enough], dtype=np.float32)
    both = np.zeros_like(mine)
    runtime._native.all_reduce(mine.ctypes.data, both.ctypes.data, 1, _NATIVE["float32"])
    return bool(both[0] == 2)


def main() -> int:
    """Returns 0 if every collective was right, 3 if the link was given up, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rank", type=int)
    parser.add_argument("--host", default="10.0.0.1", help="rank 0's address")
    parser.add_argument("--port", type=int, default=29700)
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--recoveries", type=int, default=0, help="go on until so many rails have come back, on both")
    parser.add_argument("--seconds", type=float, default=0, help="go on for so long, from the start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--largest", type=int, default=20_000, help="elements of the largest input")
    parser.add_argument("--elements", type=int, nargs="*", default=[], help="exact sizes, before the random ones")
    parser.add_argument("--options", type=json.loads, default={}, help="of RuntimeOptions, as JSON")
    args = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, FAULTS)  # before any other thread exists: they inherit it
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms: %(message)s", stream=sys.stderr)
    peer = meet(args.rank, args.host, args.port, 120)
    options = {
        **{"transport": "verbs", "timeout_s": 120.0, "slot_bytes": 1 << 18, "rail_timeout_s": RAIL_SECONDS},
        **args.options,
    }
    if "rails" in options:
        options["rails"] = tuple(options["rails"])
    outcome: dict[str, Any] = {"rank": args.rank}
    runtime = Runtime.connect(
        args.rank, 2, peer.exchange, RuntimeOptions(**options), description=socket.gethostname(), announce=peer.announce
    )
    peer.watch(runtime)
    print(f"connected {runtime.path}", flush=True)
    threading.Thread(target=fail_on_signals, args=(runtime,), daemon=True).start()
    exercise = Exercise(runtime, args.rank, args.seed, args.largest)
    pauses = Pauses()
    started = time.monotonic()
    gaps: list[float] = []
    code = 0
    try:
        for elements in args.elements:
            exercise.one(elements)
        while exercise.done < args.operations or not both_are_done(runtime, args.recoveries, args.seconds, started):
            before = time.monotonic()
            exercise.one()
            gaps.append(time.monotonic() - before)
            if exercise.done % 100 == 0:
                print(f"done {exercise.done}", flush=True)
    except CollectiveError as error:
        outcome["error"] = str(error)
        code = 3
    outcome |= {
        "operations": exercise.done,
        "digest": exercise.digest.hexdigest(),
        "seconds": round(time.monotonic() - started, 3),
        "longest": round(max(gaps, default=0), 3),
        "stalls": sum(gap >= STALL_SECONDS for gap in gaps),
        "paused": round(pauses.seconds, 3),
        "counters": dataclasses.asdict(runtime.counters()),
    }
    runtime.close()
    peer.close()
    print(json.dumps(outcome), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
