"""Trial compilations of FusedMoE's kernels: what is left out, and that every compiler ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from vllm_spark.errors import SparkError
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.fused_moe import compile
from vllm_spark.kernels.fused_moe.table import FusedMoeShape
from vllm_spark.models.weights import Int4
from vllm_spark.tune.fused_moe.trial import Trials

from .tuning_outcomes import (
    BF16,
    INT4,
    ROW,
)

needs_compiler = pytest.mark.skipif(compile.unavailable() is not None, reason=str(compile.unavailable()))


@needs_compiler
def test_what_does_not_compile_or_does_not_fit_is_left_out() -> None:
    good = ROW
    large = ROW.model_copy(update={"BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 256})
    odd = ROW.model_copy(update={"BLOCK_SIZE_N": 48})
    seen: list[None] = []
    trials = Trials(GB10, processes=2, seconds=400)
    assert trials.usable(BF16.table, [large, good, odd], lambda: seen.append(None)) == [good]
    assert len(seen) == 3
    assert trials.usable(FusedMoeShape(8, 256), [good], lambda: seen.append(None)) == [good]
    assert len(seen) == 3, "shapes of one format share their kernels"
    with pytest.raises(SparkError, match=r"none of 1 kernels.*shared memory"):
        trials.usable(BF16.table, [large])


@needs_compiler
def test_a_compiler_that_takes_too_long_is_ended() -> None:
    trials = Trials(GB10, processes=1, seconds=0.01)
    with pytest.raises(SparkError, match=r"more than 0\.01 s to compile"):
        trials.usable(BF16.table, [ROW])


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Those of every kernel that is compiled in a test."""
    seen: list[dict[str, Any]] = []
    of_vllm = compile._constants

    def kept(*given: Any) -> dict[str, Any]:
        seen.append(of_vllm(*given))
        return seen[-1]

    monkeypatch.setattr(compile, "_constants", kept)
    compile._compile.cache_clear()
    return seen


@needs_compiler
def test_kernels_of_4_bits_are_compiled_for_their_own_groups(constants: list[dict[str, Any]]) -> None:
    for int4 in (Int4(32), Int4(64, zero_points=True)):
        compiled = compile.compile_row(INT4.table, ROW.row(), (12, 1), int4=int4)
        assert compiled.registers > 0
        assert {(each["group_size"], each["has_zp"]) for each in constants} == {(int4.group_size, int4.zero_points)}
        constants.clear()


@needs_compiler
def test_both_kernels_of_a_decode_step_are_compiled(constants: list[dict[str, Any]]) -> None:
    for shape, unsorted in ((BF16, {True, False}), (INT4, {False})):
        compile.compile_row(shape.table, ROW.row(), (12, 1))
        assert {each["naive_block_assignment"] for each in constants} == unsorted
        constants.clear()


@pytest.fixture
def compiler_that_hangs(tmp_path: Path) -> Iterator[Path]:
    """In place of Python: starts an assembler that does not end, and writes down the ids of both."""
    path, draft, ids = (tmp_path / name for name in ("python", "draft", "ids"))
    path.write_text(f"#!/bin/sh\nsleep 500 &\necho $$ $! > {draft}\nmv {draft} {ids}\nwait\n")
    path.chmod(0o755)
    yield path
    for process in map(int, ids.read_text().split()):
        if lives(process):
            os.kill(process, signal.SIGKILL)


def lives(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(120)
def test_what_a_slow_compiler_started_ends_with_it(
    tmp_path: Path, compiler_that_hangs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(compiler_that_hangs))
    with pytest.raises(SparkError, match="more than 3 s to compile"):
        Trials(GB10, processes=1, seconds=3).usable(BF16.table, [ROW])
    compiler, assembler = map(int, (tmp_path / "ids").read_text().split())
    wait_until(lambda: not lives(compiler))
    wait_until(lambda: not lives(assembler))


@pytest.mark.timeout(120)
def test_a_compiler_that_leaves_its_assembler_behind_is_not_waited_for(
    tmp_path: Path, compiler_that_hangs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that_hangs.write_text(compiler_that_hangs.read_text().removesuffix("wait\n"))
    monkeypatch.setattr(sys, "executable", str(compiler_that_hangs))
    with pytest.raises(SparkError, match="exited without a result"):
        Trials(GB10, processes=1, seconds=100).usable(BF16.table, [ROW])
    assembler = int((tmp_path / "ids").read_text().split()[1])
    wait_until(lambda: not lives(assembler))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_compilers_end_with_the_tuner(tmp_path: Path, compiler_that_hangs: Path, number: signal.Signals) -> None:
    program = """
import sys
from vllm_spark.cli.tune import _exit_on_signals
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters
from vllm_spark.tune.fused_moe.trial import Trials
from vllm_spark.kernels.devices import GB10
sys.executable = sys.argv[1]
row = FusedMoeParameters(BLOCK_SIZE_M=16, BLOCK_SIZE_N=32, BLOCK_SIZE_K=128, num_warps=4, num_stages=4)
with _exit_on_signals():
    Trials(GB10, processes=1, seconds=100).usable(FusedMoeExperts(
        experts=8, top_k=2, hidden=256, intermediate=256).table, [row])
"""
    with subprocess.Popen([sys.executable, "-c", program, str(compiler_that_hangs)]) as tuner:
        wait_until((tmp_path / "ids").exists)
        compiler, assembler = map(int, (tmp_path / "ids").read_text().split())
        tuner.send_signal(number)
        code = tuner.wait(30)
        wait_until(lambda: not lives(compiler))
        if number == signal.SIGTERM:  # by SIGKILL, the kernel ends the compiler alone, and not what that started
            assert code == 128 + number
            wait_until(lambda: not lives(assembler))
