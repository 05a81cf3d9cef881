"""Times one collective of this project and of the baseline in the same run.

On GPUs the peer is NCCL, once as it chooses (NVLink, where there is one) and once over host memory, which is the only
path that two machines have; on CPUs it is gloo (vllm_spark.bench.baseline). Both ranks take turns with all candidates,
size by size, so that whatever else the machine does falls on all of them. Eager figures contain what each library's
Python costs; those of graphs do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vllm_spark.bench import machine_times
from vllm_spark.bench.baseline import Baseline, connect_baseline, gather_last
from vllm_spark.bench.machine_times import MachineTimes
from vllm_spark.bench.ranks import Rank, run_ranks
from vllm_spark.bench.statistics import percentile
from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures
from vllm_spark.collective.options import RuntimeOptions
from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.ranks import WORLD_SIZE

if TYPE_CHECKING:
    import torch

KIB, MIB = 1 << 10, 1 << 20
DEFAULT_SIZES = (
    *(size * KIB for size in (1, 4, 8, 10, 16, 32, 60, 64, 128, 480)),
    *(size * MIB for size in (1, 2, 4, 8, 32)),
)
"""10 KiB is one token of a model 5120 wide, 60 KiB a verified step of speculation, 480 KiB eight streams, 32 MiB a
prefill chunk of 8192 tokens at width 2048."""
LOGITS = 75_968
"""Columns of a rank's half of the logits: Qwen3's vocabulary over two ranks."""
LOGITS_SIZES = tuple(batch * LOGITS * 2 for batch in (1, 8))
CALLS_PER_TOKEN = 97
"""All-reduces of one decode step of a 48-layer model; a graph holds as many."""

_LARGE = MIB
_CALLS_WHEN_LARGE = 10
_WARM_UP = 3  # samples


def calls_for(size: int) -> int:
    """Number of calls with inputs of `size` bytes in a sample or a graph: those of one token, or fewer if large."""
    return CALLS_PER_TOKEN if size <= _LARGE else _CALLS_WHEN_LARGE


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        device: `cuda` (one GPU for each rank) or `cpu`.
        sizes: bytes of each rank's input.
        samples: timings for each size, candidate and mode.
        wire: the modelled link.
        collective: `all_reduce`, `all_gather`, or `logits_gather`: of [batch, 75968] along the last dimension.
    """

    device: str
    sizes: tuple[int, ...] = DEFAULT_SIZES
    samples: int = 60
    wire: WireFigures = PUBLISHED_FIGURES
    collective: str = "all_reduce"


@dataclass
class Row:
    """One candidate at one size and in one mode; times in microseconds for one call."""

    candidate: str
    mode: str
    bytes: int
    minimum: float
    median: float
    p99: float

    @property
    def gbytes_per_s(self) -> float:
        """Bytes of the input over the median time."""
        return self.bytes / self.median / 1e3


@dataclass
class Report:
    """All rows, and where they were measured."""

    settings: Settings
    machine: str
    rows: list[Row] = field(default_factory=list)
    baseline: str = ""
    """The baseline's library and its version."""
    copy_gbytes_per_s: float = 0.0
    """The limit: bandwidth of one large copy, from the GPU to host memory or within a CPU's memory."""
    times: MachineTimes | None = None
    """What this machine's GPU takes; None for CPU tensors."""

    def median(self, candidate: str, mode: str, size: int) -> float | None:
        """Microseconds; None if that was not measured."""
        for row in self.rows:
            if (row.candidate, row.mode, row.bytes) == (candidate, mode, size):
                return row.median
        return None


def measure(settings: Settings, machine: str, on_row: Callable[[Row], None]) -> Report:
    """Runs the ranks and returns the report; `on_row` is called with each row when it is measured.

    Raises:
        SparkError: a rank failed.
    """
    report = Report(settings, machine)

    def take(value: Any) -> None:
        if isinstance(value, Row):
            report.rows.append(value)
            on_row(value)
        elif isinstance(value, str):
            report.baseline = value
        elif isinstance(value, MachineTimes):
            report.times = value
        else:
            report.copy_gbytes_per_s = value

    run_ranks(_measure_rank, settings, True, on_report=take)
    if settings.device == "cuda":
        # NCCL reads this once in a process's life.
        run_ranks(_measure_rank, settings, False, environment={"NCCL_P2P_DISABLE": "1"}, on_report=take)
    return report


def shape_of(settings: Settings, size: int) -> tuple[int, ...]:
    """Shape of each rank's input of `size` bytes."""
    return (size // 2 // LOGITS, LOGITS) if settings.collective == "logits_gather" else (size // 2,)


def rows_to_come(settings: Settings) -> int:
    """Number of rows that `measure` will report."""
    modes = 2 if settings.device == "cuda" else 1
    candidates = 5 if settings.device == "cuda" else 4
    return modes * candidates * len(settings.sizes)


def check_gpus() -> None:
    """Raises ConfigurationError if there is not a GPU for each rank."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < WORLD_SIZE:
        raise ConfigurationError(
            f"--device cuda needs {WORLD_SIZE} GPUs, one for each rank, and this machine has {count}; "
            "--device cpu measures collectives on CPU tensors"
        )


Call = Callable[["torch.Tensor"], Any]


def _measure_rank(rank: Rank, settings: Settings, with_ours: bool) -> None:
    """One rank's process."""
    import torch

    torch.set_num_threads(1)
    if settings.device == "cuda":
        torch.cuda.set_device(rank.index)
    baseline = connect_baseline(rank, settings.device)
    candidates = dict(_ours(rank, settings)) if with_ours else {}
    candidates[_baseline_name(settings, with_ours)] = _baseline_call(baseline, settings)
    if with_ours and rank.index == 0:
        rank.report(baseline.library)
        rank.report(_copy_bandwidth(settings.device))
        if settings.device == "cuda":
            rank.report(machine_times.measure())
    timers: dict[str, Callable[[Call, torch.Tensor, int], float]] = (
        {"eager": _time_on_gpu, "graph": _GraphTimer()} if settings.device == "cuda" else {"eager": _time_on_cpu}
    )
    for size in settings.sizes:
        tensor = torch.ones(shape_of(settings, size), dtype=torch.bfloat16, device=settings.device)
        calls = calls_for(size)
        samples: dict[tuple[str, str], list[float]] = {(name, mode): [] for name in candidates for mode in timers}
        for _ in range(_WARM_UP + settings.samples):
            for (name, mode), taken in samples.items():
                taken.append(timers[mode](candidates[name], tensor, calls))
        if rank.index == 0:
            for (name, mode), taken in samples.items():
                kept = taken[_WARM_UP:]
                rank.report(Row(name, mode, size, min(kept), statistics.median(kept), percentile(kept, 0.99)))
    timers.clear()  # frees the graphs with the baseline's calls
    baseline.close()


def _ours(rank: Rank, settings: Settings) -> Iterator[tuple[str, Call]]:
    from vllm_spark import collective

    kind = collective.DeviceRuntime if settings.device == "cuda" else collective.Runtime
    proxied = RuntimeOptions(loopback_mode="proxied")
    wire = replace(proxied, wire=settings.wire)
    for name, options in (("direct", RuntimeOptions()), ("proxied", proxied), ("wire", wire)):
        try:
            runtime = kind.connect(rank.index, WORLD_SIZE, rank.exchange, options)
        except collective.CollectiveError as error:
            raise SparkError(str(error)) from None
        # Both gathers are along the last dimension.
        yield name, runtime.all_reduce if settings.collective == "all_reduce" else runtime.all_gather


def _baseline_name(settings: Settings, as_it_chooses: bool) -> str:
    if settings.device == "cpu":
        return "gloo"
    return "nccl" if as_it_chooses else "nccl, host memory"


def _baseline_call(baseline: Baseline, settings: Settings) -> Call:
    if settings.collective == "all_reduce":
        return baseline.all_reduce
    if settings.collective == "all_gather":
        return baseline.all_gather
    return lambda tensor: gather_last(baseline, tensor)


def _time_on_cpu(call: Call, tensor: torch.Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call(tensor)
    return (time.perf_counter() - start) * 1e6 / calls


def _time_on_gpu(call: Call, tensor: torch.Tensor, calls: int) -> float:
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        call(tensor)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3 / calls


class _GraphTimer:
    """Times a graph of calls; captures it when it sees a call or a tensor for the first time."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[int, int, int], Any] = {}

    def __call__(self, call: Call, tensor: torch.Tensor, calls: int) -> float:
        import torch

        # The size too: a later tensor may lie where a smaller one was.
        key = (id(call), tensor.data_ptr(), tensor.nbytes)
        graph = self._graphs.get(key)
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                for _ in range(calls):
                    call(tensor)
            self._graphs[key] = graph
        call(tensor)  # synchronizes both GPUs, whenever their hosts launched it
        return _time_on_gpu(lambda _: graph.replay(), tensor, 1) / calls


def _copy_bandwidth(device: str) -> float:
    """GB/s of copies of 64 MiB, the median of ten."""
    import torch

    source = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    target = torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=device == "cuda")
    timer = _time_on_gpu if device == "cuda" else _time_on_cpu
    times = [timer(lambda tensor: target.copy_(tensor, non_blocking=True), source, 1) for _ in range(12)]
    return 64 * MIB / statistics.median(times[2:]) / 1e3
