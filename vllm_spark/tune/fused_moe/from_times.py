"""Rows of a FusedMoE table from times that were measured elsewhere, for instance by vLLM's `benchmark_moe`.

Noise decides which of many candidates is the fastest: of 32 repetitions of one kernel on a GB10, the fastest was 2 to
4 % faster than their median. So candidates that run the same kernel are repetitions of each other, their median counts,
and of those within the noise of the fastest the one is taken that is within it for most numbers of tokens. A row is
used only where vLLM's own choice was measured as well and took longer. Times of int4 in steps of few tokens are left
out: `benchmark_moe` measures another kernel there than serves (`is_small_int4`).
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_spark.errors import ConfigurationError
from vllm_spark.files import read_regular
from vllm_spark.kernels.devices import DEVICES
from vllm_spark.kernels.finding import TOLERATED_LOSS
from vllm_spark.kernels.fused_moe.check import shared_bytes
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, is_small_int4, vllm_row
from vllm_spark.kernels.table import LARGEST_ROW

COLUMNS = ("M", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages", "kernel_us")
"""Of the file: tokens of the step, the candidate, and microseconds (empty if the candidate failed)."""

_LARGEST_FILE = 64 << 20
_NAMES = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")

Candidate = tuple[int, ...]


@dataclass(frozen=True)
class SizeResult:
    """The result of the times for one number of tokens.

    Attributes:
        tokens: of the step.
        row: the candidate that is taken, with vLLM's names.
        microseconds: its median.
        repetitions: times of which that is the median.
        vllm_us: median of vLLM's own choice; None if that was not measured.
        used: whether the row is to be used.
    """

    tokens: int
    row: dict[str, int]
    microseconds: float
    repetitions: int
    vllm_us: float | None
    used: bool

    @property
    def gain(self) -> float | None:
        """Share of the time of vLLM's choice that it saves; None if that was not measured."""
        return None if self.vllm_us is None else 1 - self.microseconds / self.vllm_us


def read_times(path: Path) -> dict[int, dict[Candidate, list[float]]]:
    """The times in a file of comma-separated values with the columns `COLUMNS`: by tokens and candidate.

    Raises:
        ConfigurationError: it cannot be read or has other content; the message has the line.
    """
    try:
        text = read_regular(path, _LARGEST_FILE).decode("utf-8")
    except OSError as error:
        raise ConfigurationError(f"the times {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigurationError(f"the times {path} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text))
    if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
        raise ConfigurationError(f"{path} has no column {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    found: dict[int, dict[Candidate, list[float]]] = {}
    for line in reader:
        try:
            tokens, *candidate = (_positive(line[name]) for name in COLUMNS[:-1])
            time = float(line["kernel_us"]) if line["kernel_us"] else None
            if time is not None and not 0 < time < float("inf"):
                raise ValueError(f"{line['kernel_us']} is not a time in microseconds")
        except (ValueError, TypeError) as error:
            raise ConfigurationError(f"line {reader.line_num} of {path} is invalid: {error}") from None
        if time is not None:
            found.setdefault(tokens, {}).setdefault(tuple(candidate), []).append(time)
    if not found:
        raise ConfigurationError(f"{path} has no time of a kernel; give a file with at least one")
    return found


def evaluate(
    times: Mapping[int, Mapping[Candidate, list[float]]],
    shape: FusedMoeExperts,
    device: str,
) -> list[SizeResult]:
    """The row for each number of tokens for which the kernel that serves was measured.

    Args:
        times: as `read_times` returns them.
        shape: that was measured.
        device: on which, as in names of tables.

    Raises:
        ConfigurationError: no candidate for a size can run on the device.
    """
    medians = {
        tokens: _medians(its, shape) for tokens, its in sorted(times.items()) if not is_small_int4(shape, tokens)
    }
    results = []
    for tokens, known in medians.items():
        fitting = {key: value for key, value in known.items() if _fits(_row(key), shape, device)}
        if not fitting:
            raise ConfigurationError(f"no candidate for {tokens} tokens fits the shared memory of {device}")
        chosen = _chosen(fitting, medians.values())
        time, repetitions = fitting[chosen]
        theirs = _vllm_time(known, shape, device, tokens)
        used = theirs is not None and time < (1 - TOLERATED_LOSS) * theirs
        results.append(SizeResult(tokens, _row(chosen), time, repetitions, theirs, used))
    return results


Medians = Mapping[Candidate, tuple[float, int]]


def _medians(candidates: Mapping[Candidate, list[float]], shape: FusedMoeExperts) -> Medians:
    """Median and number of the times of each kernel that differs."""
    merged: dict[Candidate, list[float]] = {}
    for candidate, its in candidates.items():
        merged.setdefault(_kernel(candidate, shape), []).extend(its)
    return {key: (statistics.median(its), len(its)) for key, its in merged.items()}


def _kernel(candidate: Candidate, shape: FusedMoeExperts) -> Candidate:
    """The part of a candidate that makes a difference."""
    size_m, size_n, size_k, *rest = candidate
    if shape.block_shape is not None:
        size_k = min(size_k, *shape.block_shape)
    return size_m, size_n, size_k, *rest


def _row(kernel: Candidate) -> dict[str, int]:
    return {**dict(zip(_NAMES, kernel, strict=True)), "SPLIT_K": 1}


def _fits(row: Mapping[str, int], shape: FusedMoeExperts, device: str) -> bool:
    needed, limits = shared_bytes(shape.table, row), DEVICES.get(device)
    return needed is None or limits is None or needed <= limits.shared_bytes


def _chosen(fitting: Medians, others: Iterable[Medians]) -> Candidate:
    """Of the candidates within the noise of the fastest, the one that is so for most sizes, then the fastest."""
    counts = dict.fromkeys(fitting, 0)
    for known in others:
        for candidate in _within_noise(known):
            if candidate in counts:
                counts[candidate] += 1
    return min(_within_noise(fitting), key=lambda candidate: (-counts[candidate], fitting[candidate][0]))


def _within_noise(known: Medians) -> list[Candidate]:
    fastest = min(time for time, _ in known.values())
    return [candidate for candidate, (time, _) in known.items() if time <= (1 + TOLERATED_LOSS) * fastest]


def _vllm_time(known: Medians, shape: FusedMoeExperts, device: str, tokens: int) -> float | None:
    """The median of vLLM's own choice, if it is among the candidates."""
    row = vllm_row(shape, device, tokens)
    if shape.is_int4:  # vLLM completes it; Triton's own defaults for the rest
        wide = (32, 64) if tokens == 1 else (64, 32)
        row |= {"BLOCK_SIZE_N": wide[0], "BLOCK_SIZE_K": wide[1], "num_warps": 4, "num_stages": 3}
    own = _kernel(tuple(row[name] for name in _NAMES), shape)
    return known[own][0] if own in known else None


def _positive(text: str) -> int:
    number = int(text)
    if not 0 < number <= LARGEST_ROW:
        raise ValueError(f"{number} is not a whole number from 1 to {LARGEST_ROW}")
    return number
