"""Times decode steps of vLLM with one rank, this project's pair, and vLLM's own pair, in the same run.

Weights are random, since the time of a step does not depend on their values; the shapes are the model's. Each candidate
is a real engine in a separate process (vllm_spark/bench/decode/engine.py), and the pair has a real follower.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from vllm_spark.bench.decode.engine import PROFILED, Job, Result, TokenLogprob
from vllm_spark.bench.kernel_profile import KernelProfile
from vllm_spark.bench.statistics import percentile
from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures, store_wire_model
from vllm_spark.config.settings import SECRET_VARIABLE
from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.files import atomic_write_text, configs_folder
from vllm_spark.models.tiny import make_tiny_model
from vllm_spark.processes.child import python_module
from vllm_spark.processes.group import ProcessGroup
from vllm_spark.processes.local import CPU_ENVIRONMENT, LOOPBACK, free_ports
from vllm_spark.processes.managed import LAUNCH_VARIABLES, Process, ProcessError, clean_environment
from vllm_spark.records import from_json, to_json

Device = Literal["cuda", "cpu"]

SHIPPED_MODELS = {"cuda": "qwen3-30b-a3b-int4", "cpu": "tiny-moe"}
"""Default models: a configuration in `configs/models`, and one that is generated."""

TUNING = ("untuned", "tuned")
"""Candidates that differ only in tables of kernels' parameters."""

_WARM_UP = 20  # steps
_ONE_GPU_SHARE = 0.42  # of its memory for each rank's engine, where both share it
_MOST_OF_A_GPU = 0.9
_SHUTDOWN_SECONDS = 60.0  # time limit of an engine's shutdown


@dataclass(frozen=True)
class Candidate:
    """One way to run the model.

    Attributes:
        what: in a few words, for the report.
        ranks: 1 or 2.
        engine: arguments of `vllm.LLM` in addition to those of all candidates.
        spark: settings of this project; None for stock vLLM.
        environment: variables of its processes.
        unset: variables of the user's environment that its processes do not get.
        tuned: one rank with tuned tables of kernels' parameters; a pair always uses them.
    """

    what: str
    ranks: int
    engine: dict[str, Any] = field(default_factory=dict)
    spark: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    tuned: bool = False


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        device: `cuda` (one GPU for each rank) or `cpu`.
        model: a folder with a config.json, or one of `SHIPPED_MODELS`.
        candidates: names of `candidates_for(device)`, in the order in which they run, which is reversed in every
            other round, so that no candidate is always the first on a cool machine.
        batches: sequences decoded together.
        steps: timed for each batch.
        rounds: how often all candidates run; an even number treats all candidates alike.
        prompt_tokens: length of each prompt.
        compile: torch.compile in the engine, which is vLLM's default; else only CUDA graphs (eager on a CPU).
        one_gpu: both ranks share the first GPU: a test of function, not of speed.
        wire: the modelled link.
        engine: further arguments of `vllm.LLM`, which take precedence.
        environment: variables of every candidate's processes.
        timeout: seconds for one candidate.
        profile: also time the kernels of the first batch's steps, on rank 0's GPU.
    """

    device: Device
    model: str
    candidates: tuple[str, ...]
    batches: tuple[int, ...] = (1, 4, 8)
    steps: int = 200
    rounds: int = 1
    prompt_tokens: int = 64
    compile: bool = False
    one_gpu: bool = False
    wire: WireFigures = PUBLISHED_FIGURES
    engine: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    timeout: float = 900.0
    profile: bool = False


@dataclass
class Row:
    """One candidate at one batch; times in milliseconds for one step, over all rounds."""

    candidate: str
    batch: int
    minimum: float
    median: float
    p99: float
    medians: list[float]
    """Median of each round."""
    tokens: list[list[int]]
    logprobs: list[list[TokenLogprob]]
    """As in `Result`."""

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences in a second, at the median."""
        return self.batch * 1e3 / self.median


@dataclass
class Report:
    """All rows, and where they were measured."""

    settings: Settings
    vllm: str = ""
    rows: list[Row] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)
    """For candidates with this project: collectives that used vLLM's own path."""
    profiles: dict[str, KernelProfile] = field(default_factory=dict)
    """Kernels of rank 0's GPU."""
    rounds: dict[str, int] = field(default_factory=dict)
    """How often each candidate has run."""
    failed_ends: dict[str, str] = field(default_factory=dict)
    """For candidates whose programs failed after their measurements were complete: the error."""

    @property
    def missing(self) -> list[str]:
        """Candidates that have not run in every round."""
        return [name for name in self.settings.candidates if self.rounds.get(name, 0) < self.settings.rounds]

    def row(self, candidate: str, batch: int) -> Row | None:
        """None if that was not measured."""
        for row in self.rows:
            if (row.candidate, row.batch) == (candidate, batch):
                return row
        return None

    def speedup(self, candidate: str, batch: int, peer: str) -> float | None:
        """Tokens per second over those of `peer`: the median of the rounds' ratios."""
        mine, theirs = self.row(candidate, batch), self.row(peer, batch)
        if mine is None or theirs is None:
            return None
        # The numbers of rounds differ by one if a later candidate failed.
        return statistics.median(other / own for own, other in zip(mine.medians, theirs.medians, strict=False))


def candidates_for(device: Device, wire_file: Path | None = None) -> dict[str, Candidate]:
    """Every candidate by name; ratios refer to the last one, which uses the path between two machines.

    Args:
        device: of all candidates.
        wire_file: with the modelled link; None where only the names count.
    """
    wire = {"loopback_mode": "proxied", "wire": None if wire_file is None else str(wire_file)}
    ours = {
        "tp1": Candidate("one rank", 1),
        "spark": Candidate("vllm_spark, direct", 2, spark={}),
        "spark-wire": Candidate("vllm_spark, proxied, modelled wire", 2, spark=wire),
    }
    stock = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    if device == "cpu":
        return {**ours, "stock": Candidate("vLLM's own", 2, stock)}
    nccl = {**stock, "disable_custom_all_reduce": True}
    # vLLM has other all-reduces for GPUs with peer access, which two machines do not have.
    alone = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}
    tables = ("VLLM_TUNED_CONFIG_FOLDER",)  # the user's, which would take precedence on both sides
    untuned = Candidate("one rank, vLLM's own parameters", 1, unset=tables)
    return {
        "untuned": untuned,
        "tuned": replace(untuned, what="the same with tuned tables", tuned=True),
        **ours,
        "stock": Candidate("vLLM's own choice between GPUs of one machine", 2, stock),
        "nccl": Candidate("NCCL as it chooses", 2, nccl, environment=alone),
        "nccl-host": Candidate("NCCL over host memory", 2, nccl, environment={**alone, "NCCL_P2P_DISABLE": "1"}),
    }


def default_candidates(device: Device, one_gpu: bool) -> tuple[str, ...]:
    """All but `TUNING`; on one GPU those that two ranks can run there (NCCL refuses)."""
    candidates = {name: each for name, each in candidates_for(device).items() if name not in TUNING}
    return tuple(name for name, each in candidates.items() if not one_gpu or each.ranks == 1 or each.spark is not None)


def check(settings: Settings) -> None:
    """Raises ConfigurationError for settings that cannot work, before anything starts."""
    known = candidates_for(settings.device)
    for name in settings.candidates:
        if name not in known:
            raise ConfigurationError(
                f"there is no candidate {name!r} for --device {settings.device}; choose from {', '.join(known)}"
            )
    if settings.device != "cuda":
        for option in ("profile", "one_gpu"):
            if getattr(settings, option):
                raise ConfigurationError(f"--{option.replace('_', '-')} is about GPUs; it needs --device cuda")
    alone = default_candidates(settings.device, one_gpu=True)
    if settings.one_gpu and (not_alone := set(settings.candidates) - {*alone, *TUNING}):
        raise ConfigurationError(
            f"{', '.join(sorted(not_alone))} cannot run with --one-gpu: NCCL does not support two ranks on one GPU; "
            f"choose from {', '.join(alone)}"
        )
    if settings.device == "cuda":
        needed = 1 if settings.one_gpu else max(known[name].ranks for name in settings.candidates)
        visible = len(_visible_gpus())
        if visible == 0:
            raise ConfigurationError("--device cuda: this machine has no GPU that CUDA sees; try --device cpu")
        if visible < needed:
            raise ConfigurationError(
                f"{', '.join(settings.candidates)} need {needed} GPUs, and this machine has {visible}; choose "
                "--candidates tp1, or --one-gpu, which tests the function and not the speed"
            )


def measure(
    settings: Settings,
    programs: ProcessGroup,
    on_candidate: Callable[[str, int], None],
    on_report: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Runs every candidate in every round and returns the report.

    Args:
        on_candidate: called with name and round (from 0) before each.
        on_report: called after each with all that was measured so far: what comes later may fail.

    Raises:
        SparkError: a candidate failed; its programs' logs are in `programs.logs`.
    """
    model = _model_folder(settings, programs.folder)
    wire_file = programs.folder / "wire.json"
    store_wire_model(settings.wire, wire_file)
    candidates = candidates_for(settings.device, wire_file)
    results: dict[str, list[Result]] = {name: [] for name in settings.candidates}
    for number in range(settings.rounds):
        for name in settings.candidates[:: -1 if number % 2 else 1]:
            on_candidate(name, number)
            result = _run(name, candidates[name], model, settings, programs, number)
            _require_all_steps(name, result, settings)
            results[name].append(result)
            report = _report(settings, results)
            on_report(report)
    return report


def _require_all_steps(name: str, result: Result, settings: Settings) -> None:
    for batch in settings.batches:
        if (steps := len(result.milliseconds[batch])) < settings.steps:
            raise SparkError(
                f"{name}: at batch {batch}, only {steps} steps had a token of every sequence, and {settings.steps} "
                f"are needed: prefilling {settings.prompt_tokens} tokens of each takes too many steps; use fewer "
                "--prompt-tokens or a smaller batch, or more --steps"
            )


def _report(settings: Settings, results: Mapping[str, Sequence[Result]]) -> Report:
    """The report of the candidates that have run."""
    report = Report(settings)
    for name, rounds in results.items():
        report.rounds[name] = len(rounds)
        if not rounds:
            continue
        report.vllm = rounds[0].vllm
        if rounds[0].fallbacks is not None:
            report.fallbacks[name] = max(result.fallbacks or 0 for result in rounds)
        if failed_end := next((result.failed_end for result in rounds if result.failed_end), ""):
            report.failed_ends[name] = failed_end
        if (profile := rounds[0].profile) is not None:
            report.profiles[name] = profile
        for batch in settings.batches:
            samples = [result.milliseconds[batch] for result in rounds]
            pooled = [sample for round_samples in samples for sample in round_samples]
            report.rows.append(
                Row(
                    name,
                    batch,
                    min(pooled),
                    statistics.median(pooled),
                    percentile(pooled, 0.99),
                    [statistics.median(round_samples) for round_samples in samples],
                    rounds[0].tokens[batch],
                    rounds[0].logprobs[batch],
                )
            )
    return report


def _run(
    name: str, candidate: Candidate, model: Path, settings: Settings, programs: ProcessGroup, number: int
) -> Result:
    """Runs one candidate in one round."""
    secret = {SECRET_VARIABLE: os.urandom(16).hex()}
    engine = _engine_arguments(settings, model) | candidate.engine
    with ExitStack() as stack:
        follower: Process | None = None
        if candidate.spark is not None:
            (port,) = free_ports(1)
            engine["additional_config"] = {
                "spark": {"address": LOOPBACK, "port": port, "transport": "loopback", **candidate.spark}
            }
            join = python_module("vllm_spark", "join", "--once", "--leader", LOOPBACK, "--port", str(port))
            follower = stack.enter_context(
                programs.started(
                    f"{name}: vllm-spark join",
                    join,
                    f"{name}-{number}-follower.log",
                    _environment(settings, candidate, 1) | secret,
                )
            )
        job, result = (programs.folder / f"{name}-{number}.{kind}.json" for kind in ("job", "result"))
        atomic_write_text(job, to_json(_job(settings, candidate, engine)).decode(), "job")
        process = stack.enter_context(
            programs.started(
                f"{name}: the engine",
                python_module("vllm_spark.bench.decode.engine", str(job), str(result)),
                f"{name}-{number}.log",
                _environment(settings, candidate, 0) | secret,
            )
        )
        return _outcome(process, follower, result, settings.timeout)


def _job(settings: Settings, candidate: Candidate, engine: dict[str, Any]) -> Job:
    return Job(
        engine | settings.engine,
        list(settings.batches),
        settings.prompt_tokens,
        settings.steps,
        _WARM_UP,
        candidate.tuned,
        settings.profile,
    )


def _outcome(process: Process, follower: Process | None, file: Path, timeout: float) -> Result:
    """Waits for the result, then for the exit of the programs; a failure after the result is added to it.

    Args:
        process: the engine's.
        follower: the pair's, which exits with 0 after the engine.
        file: the result, which the engine writes.
        timeout: seconds until it exists.

    Raises:
        ProcessError: a program exited before, or the time is over.
    """

    def follows() -> None:
        if follower is not None and follower.exit_code:
            raise ProcessError(f"{follower.name} failed, exit code {follower.exit_code}", follower)

    def decoded() -> bool:
        if file.exists():
            return True
        follows()
        return False

    def ended() -> bool:
        follows()
        return process.exit_code == 0

    process.wait_until(decoded, timeout, "decoded everything")
    result = from_json(file.read_bytes(), Result)
    try:
        process.wait_until(ended, _SHUTDOWN_SECONDS, "shut down")
    except ProcessError as error:
        result.failed_end = str(error)
    return result


def _engine_arguments(settings: Settings, model: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": settings.prompt_tokens + max(settings.steps + _WARM_UP, 3 * PROFILED) + 16,
        "max_num_seqs": max(settings.batches),
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    if settings.device == "cpu":
        return arguments | ({} if settings.compile else {"enforce_eager": True})
    if settings.one_gpu:
        arguments["gpu_memory_utilization"] = _ONE_GPU_SHARE
    elif set(settings.candidates) <= set(TUNING):
        arguments["gpu_memory_utilization"] = memory_share(*_memory())
    graphs: dict[str, Any] = {"cudagraph_capture_sizes": sorted(settings.batches)}
    if not settings.compile:
        graphs |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return arguments | {"compilation_config": graphs}


def memory_share(free: int, total: int) -> float:
    """Share of a GPU's memory for one engine: most of what the tuner and other programs leave free.

    Args:
        free: bytes.
        total: bytes.
    """
    return math.floor(_MOST_OF_A_GPU * 1000 * min(free / total, 1)) / 1000


def _memory() -> tuple[int, int]:
    """Free and total bytes of the first GPU, counted as in vLLM's check at its start."""
    import torch

    free, total = torch.cuda.mem_get_info(0)
    if getattr(torch.cuda.get_device_properties(0), "is_integrated", False):
        free = psutil.virtual_memory().available  # unified memory, where the kernel can free caches
    return free, total


def _environment(settings: Settings, candidate: Candidate, rank: int) -> dict[str, str]:
    """The variables of a rank's process; the engine of a stock pair sees both GPUs."""
    own = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    own |= settings.environment | candidate.environment
    if settings.device == "cpu":
        return clean_environment() | CPU_ENVIRONMENT | own
    # The user's settings of vLLM apply to every candidate; those of a pair are set by each candidate.
    users = {name: value for name, value in clean_environment(LAUNCH_VARIABLES).items() if name not in candidate.unset}
    if candidate.ranks == 2 and candidate.spark is None:
        return users | own
    gpus = _visible_gpus()
    return users | own | {"CUDA_VISIBLE_DEVICES": gpus[0 if settings.one_gpu else rank]}


def _visible_gpus() -> list[str]:
    """The GPUs' names in CUDA_VISIBLE_DEVICES."""
    import torch

    if not torch.cuda.is_available():
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _model_folder(settings: Settings, folder: Path) -> Path:
    """A folder with the model's configuration.

    Raises:
        ConfigurationError: there is no model of that name.
    """
    if settings.model == SHIPPED_MODELS["cpu"]:
        return make_tiny_model(folder / settings.model, "moe")
    shipped = configs_folder() / "models"
    for path in (Path(settings.model), shipped / settings.model):
        if (path / "config.json").is_file():
            return path.resolve()
    names = ", ".join([*sorted(path.name for path in shipped.iterdir()), SHIPPED_MODELS["cpu"]])
    raise ConfigurationError(
        f"--model {settings.model} is not a folder with a config.json; give one, or one of {names}"
    )
