"""Random collectives for a given time, with random faults of the rails; memory and descriptors are watched.

    python -m benchmarks.soak --minutes 60 [--mode verbs] [--device cpu] [--seed N] [--json FILE]

Two ranks run the same random collectives of tests/rdma/exercise.py (on GPUs: of tests/gpu/test_many.py, eager and in
graphs), each of which draws both inputs and compares every bit of the result. In mode `verbs` their messages go over
NICs that are emulated (tests/native/verbs_emulated.cpp), whose rails fail by chance: they are cut, lose large packets,
are late, refuse posts, end writes with an error. At the end both ranks' digests must be equal, every rail that failed
must have come back, and neither process may have grown by more than --growth MiB or have more descriptors than after
the first minute. It does not measure speed: how many collectives were run depends on the faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.native.emulated_nics import EmulatedNics
from tests.native.programs import Programs, without_preload
from vllm_spark.bench.statistics import machine
from vllm_spark.processes.local import free_ports

MODES: dict[str, dict[str, Any]] = {
    "direct": {},
    "proxied": {"loopback_mode": "proxied"},
    "wire": {"loopback_mode": "proxied", "wire": "published"},
    "verbs": {"transport": "verbs", "rail_timeout_s": 0.5},
}
FAULTS = (
    *(("cut", 1, (0,)), ("cut", 1, (1,)), ("cut", 1, (0, 1))),
    *(("lose_over", 2048, (0,)), ("lose_over", 2048, (1,))),
    *(("delay_us", 2000, (0, 1)), ("refuse_posts", 3, (0,)), ("refuse_posts", 3, (1,))),
    *(("fail_next", 9, (0,)), ("fail_next", 9, (1,))),
)
"""Field of the emulated NIC, value, rails."""
LONGEST_FAULT, LONGEST_PAUSE = 2.0, 5.0
SETTLED_SECONDS = 60.0
"""From then on a process must not grow."""
BLOCK = 500
"""Operations between two looks whether both ranks are to stop."""


@dataclass
class Watch:
    """What a process takes, from the first minute on."""

    pid: int
    megabytes: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def look(self) -> None:
        process = psutil.Process(self.pid)
        self.megabytes.append(process.memory_info().rss / (1 << 20))
        self.descriptors.append(process.num_fds())

    @property
    def growth(self) -> float:
        """MiB between the first look and the last."""
        return self.megabytes[-1] - self.megabytes[0] if self.megabytes else 0.0

    @property
    def more_descriptors(self) -> int:
        """Between the first look and the last."""
        return self.descriptors[-1] - self.descriptors[0] if self.descriptors else 0


def failing_rails(nics: EmulatedNics | None, seed: int) -> AbstractContextManager[Counter[str]]:
    """Meanwhile one fault comes after the other; counts them. None without rails."""
    if nics is None:
        return nullcontext(Counter[str]())
    return nics.failing_rails(FAULTS, LONGEST_FAULT, LONGEST_PAUSE, seed)


def run_rank(rank: int, port: int, seconds: float, seed: int, options: dict[str, Any]) -> None:
    """A rank's process on CPU tensors; prints its report."""
    import numpy as np

    from tests.rdma.exercise import Exercise, meet
    from vllm_spark import _native
    from vllm_spark.collective import Runtime

    peer = meet(rank, "127.0.0.1", port, 60)
    runtime = Runtime.connect(rank, 2, peer.exchange, runtime_options(options), announce=peer.announce)
    peer.watch(runtime)
    exercise = Exercise(runtime, rank, seed, 20_000)
    end = time.monotonic() + seconds
    mine, both = np.zeros(1, np.float32), np.zeros(1, np.float32)
    while both[0] < 2:
        for _ in range(BLOCK):
            exercise.one()
        mine[0] = time.monotonic() > end
        runtime._native.all_reduce(mine.ctypes.data, both.ctypes.data, 1, _native.DType.FLOAT32)
        both[0] = 2 if both[0] else 0  # both stop once one of them is to
    # Until every rail of both that failed has come back: a rank that closes ends the other's attempts.
    until = time.monotonic() + 120
    both[0] = 0
    while both[0] < 2:
        time.sleep(0.1)
        counters = runtime.counters()
        mine[0] = counters.rail_failures == counters.rail_recoveries or time.monotonic() > until
        runtime._native.all_reduce(mine.ctypes.data, both.ctypes.data, 1, _native.DType.FLOAT32)
    report = {"operations": exercise.done, "digest": exercise.digest.hexdigest()}
    report["counters"] = asdict(runtime.counters())
    runtime.close()
    peer.close()
    print(json.dumps(report))


def runtime_options(options: dict[str, Any]) -> Any:
    """Of a rank in this mode."""
    from vllm_spark.collective import RuntimeOptions
    from vllm_spark.collective.link_model import PUBLISHED_FIGURES

    given = dict(options)
    if given.get("wire") == "published":
        given["wire"] = PUBLISHED_FIGURES
    return RuntimeOptions(**{"timeout_s": 120.0, "slot_bytes": 1 << 18, "link_timeout_s": 60.0, **given})


def run_on_cpus(
    mode: str, seconds: float, seed: int, nics: EmulatedNics | None, look: Callable[[list[Watch]], None]
) -> Any:
    """Both ranks' reports, the faults, and what their processes took."""
    (port,) = free_ports(1)
    words = [str(port), str(seconds), str(seed), json.dumps(MODES[mode])]
    environment = without_preload() | ({} if nics is None else nics.environment)
    ranks: list[subprocess.Popen[str]] = []
    try:
        for rank in ("0", "1"):
            command = [sys.executable, "-m", "benchmarks.soak", "--rank", rank, *words]
            ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
        watches = [Watch(process.pid) for process in ranks]
        begun = time.monotonic()
        with failing_rails(nics, seed) as faults:
            while time.monotonic() - begun < seconds:
                time.sleep(min(10.0, seconds / 20))
                if any(process.poll() is not None for process in ranks):
                    for process in ranks:
                        process.kill()
                    break
                if time.monotonic() - begun > min(SETTLED_SECONDS, seconds / 4):
                    look(watches)
        printed = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    codes = [process.returncode for process in ranks]
    if any(codes):
        raise SystemExit(f"the ranks ended with {codes}; see what they have printed")
    return [json.loads(text.splitlines()[-1]) for text in printed], faults, watches


def run_on_gpus(
    mode: str, seconds: float, seed: int, nics: EmulatedNics | None, look: Callable[[list[Watch]], None]
) -> Any:
    """The same with both ranks as threads of this process; the collectives are those of tests/gpu/test_many.py."""
    from tests.gpu.test_many import run_many
    from vllm_spark.bench.gpu_ranks import GpuPair

    options = runtime_options(MODES[mode])
    watches = [Watch(os.getpid())]
    with closing(GpuPair((options, options))) as pair:
        begun = time.monotonic()
        with failing_rails(nics, seed) as faults:
            while time.monotonic() - begun < seconds:
                run_many(pair)
                if time.monotonic() - begun > min(SETTLED_SECONDS, seconds / 4):
                    look(watches)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            counters = [runtime.counters() for runtime in pair.runtimes]
            if all(count.rail_failures == count.rail_recoveries for count in counters):
                break
            time.sleep(0.1)
    # Each result was compared on the GPU; a digest of them would be the same by that.
    reports = [
        {"operations": count.all_reduces + count.all_gathers, "digest": "compared", "counters": asdict(count)}
        for count in counters
    ]
    return reports, faults, watches


def problems(reports: list[dict[str, Any]], watches: list[Watch], growth: float) -> list[str]:
    """What is not as it should be."""
    found = []
    if reports[0]["digest"] != reports[1]["digest"]:
        found.append("the ranks' digests differ")
    for rank, report in enumerate(reports):
        counters = report["counters"]
        if counters["rail_failures"] != counters["rail_recoveries"]:
            found.append(f"rank {rank}: {counters['rail_failures']} failures, {counters['rail_recoveries']} recoveries")
    for watch in watches:
        if watch.growth > growth:
            found.append(f"process {watch.pid} grew by {watch.growth:.1f} MiB")
        if watch.more_descriptors > 0:
            found.append(f"process {watch.pid} has {watch.more_descriptors} more descriptors")
    return found


def main() -> int:
    """Returns 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--mode", choices=MODES, default="verbs")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--growth", type=float, default=16.0, metavar="MIB")
    parser.add_argument("--seed", type=int, help="of the collectives and the faults (default: any)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank, port, seconds, seed, options = args.rank
        run_rank(int(rank), int(port), float(seconds), int(seed), json.loads(options))
        return 0

    seed = random.randrange(1 << 30) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)

    def look(watches: list[Watch]) -> None:
        for watch in watches:
            watch.look()

    with tempfile.TemporaryDirectory(prefix="vllm-spark-soak-") as folder, ExitStack() as stack:
        nics: EmulatedNics | None = None
        if args.mode == "verbs":
            for name in ("programs", "nics"):
                (Path(folder) / name).mkdir()
            library = Programs(Path(folder) / "programs").libibverbs("verbs_emulated.cpp")
            nics = stack.enter_context(closing(EmulatedNics(Path(folder) / "nics", library)))
            if args.device == "cuda":
                nics.use_in_this_process()
        run = run_on_cpus if args.device == "cpu" else run_on_gpus
        reports, faults, watches = run(args.mode, 60 * args.minutes, seed, nics, look)
    found = problems(reports, watches, args.growth)
    summary = {
        "machine": machine(),
        "device": args.device,
        "mode": args.mode,
        "minutes": args.minutes,
        "seed": seed,
        "faults": faults,
        "ranks": reports,
        "growth_mib": [round(watch.growth, 1) for watch in watches],
        "problems": found,
    }
    print(json.dumps(summary, indent=1))
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
