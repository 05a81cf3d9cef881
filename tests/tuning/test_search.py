"""The search for kernels' parameters with real kernels, on shapes so small that it takes seconds."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_spark.errors import SparkError
from vllm_spark.kernels.fused_moe.shapes import FusedMoeExperts, FusedMoeParameters, vllm_row
from vllm_spark.kernels.marlin.table import MarlinShape
from vllm_spark.tune.results import MARLIN_DEFAULT, Outcome, Shape

pytest.importorskip("vllm")

MARLIN = {
    "moe_w13": MarlinShape(
        kernel="moe_w13", experts=8, top_k=2, size_n=512, size_k=256, group_size=128, quant_type="uint4b8"
    ),
    "moe_w2": MarlinShape(
        kernel="moe_w2", experts=8, top_k=2, size_n=256, size_k=256, group_size=128, quant_type="uint4"
    ),
}
BF16 = FusedMoeExperts(experts=8, top_k=2, hidden=256, intermediate=256)
TRITON = {
    "bf16": BF16,
    "many": BF16.model_copy(update={"experts": 64}),  # then vLLM sorts no tokens
    "fp8_block": BF16.model_copy(update={"dtype": "fp8_w8a8", "block_shape": (128, 128)}),
    "fp8_channel": BF16.model_copy(update={"dtype": "fp8_w8a8"}),
    "int4": BF16.model_copy(update={"dtype": "int4_w4a16", "group_size": 128}),
    "int4_zero_points": BF16.model_copy(update={"dtype": "int4_w4a16", "group_size": 64, "zero_points": True}),
}
ROUNDING = {None: 0.01, "int4_w4a16": 0.01, "fp8_w8a8": 0.03}
"""Of the norm: between the GEMMs is rounded to the format, and a sum in another order may round the other way."""


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the whole space takes minutes."""
    from vllm_spark.tune.fused_moe import search as fused_moe_search

    whole = fused_moe_search.search_space

    def few(*args: Any) -> list[FusedMoeParameters]:
        space = whole(*args)
        return space[:: max(1, len(space) // 4)]

    monkeypatch.setattr(fused_moe_search, "search_space", few)


@pytest.fixture
def device() -> Any:
    from vllm_spark.kernels.runtime import this_device

    return this_device()


@pytest.fixture(scope="module")
def trials() -> Any:
    """One for all: a format's kernels are compiled once."""
    from vllm_spark.kernels.runtime import this_device
    from vllm_spark.tune.fused_moe.trial import Trials

    return Trials(this_device())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of two outputs, as a share of the norm."""
    assert torch.isfinite(found).all()
    assert wanted.float().norm() > 0
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("kernel", MARLIN)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_marlin(kernel: str, rows: int, device: Any) -> None:
    from vllm_spark.tune.marlin.problem import MarlinProblem
    from vllm_spark.tune.marlin.search import search, search_space, weights_of

    shape = MARLIN[kernel]
    with weights_of(shape) as layers:
        outcome = search(shape, rows, layers, device, rounds=3)
        assert (outcome.shape, outcome.rows) == (shape, rows)
        assert outcome.tried
        assert outcome.tuned_us > 0
        problem = MarlinProblem(shape, layers, rows, 2, seed=1)
        wanted = problem.call(0, MARLIN_DEFAULT).clone()
        for parameters in search_space(shape, device):
            assert distance(problem.call(0, parameters), wanted) < 0.01, parameters


@pytest.mark.parametrize("name", TRITON)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_triton(name: str, rows: int, device: Any, trials: Any) -> None:
    from vllm_spark.tune.fused_moe.problem import FusedMoeProblem
    from vllm_spark.tune.fused_moe.search import search, weights_of

    shape = TRITON[name]
    with weights_of(shape) as layers:
        outcome = search(shape, rows, layers, device, trials, rounds=3)
        assert (outcome.shape, outcome.rows) == (shape, rows)
        assert outcome.tried
        assert outcome.tuned_us > 0
        problem = FusedMoeProblem(shape, layers, rows, 2, 1, device.name)
        wanted = problem.call(0, None)
        for parameters, _ in outcome.tried:
            assert distance(problem.call(0, parameters), wanted) < ROUNDING[shape.dtype], parameters


@pytest.mark.parametrize("name", ["bf16", "fp8_block", "fp8_channel"])
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_the_default_is_what_vllm_does(name: str, rows: int, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    from vllm_spark.tune.fused_moe import problem as fused_moe_problem
    from vllm_spark.tune.fused_moe.search import weights_of

    shape = TRITON[name]
    with weights_of(shape) as layers:
        problem = fused_moe_problem.FusedMoeProblem(shape, layers, rows, 2, 1, device.name)
        ours = problem.call(0, None)
        monkeypatch.setattr(fused_moe_problem, "_overriding", lambda row: nullcontext())
        assert torch.equal(ours, problem.call(0, None))


@pytest.mark.parametrize("name", TRITON)
def test_rows_above_are_vllms(name: str, device: Any) -> None:
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    from vllm_spark.compat.versions import triton_runs_int4_experts

    shape = TRITON[name]
    if shape.is_int4 and not triton_runs_int4_experts():
        pytest.skip("the rule of this vLLM is for its CUDA kernel, and gives sizes that the Triton kernel refuses")
    packed = 2 if shape.is_int4 else 1
    block = [0, shape.group_size] if shape.is_int4 else list(shape.block_shape or ()) or None
    for tokens in (1, 2, 4, 8, 9, 16, 17, 33, 65, 128, 500, 1000, 2048, 5000):
        theirs = try_get_optimal_moe_config(
            (shape.experts, 2 * shape.intermediate, shape.hidden // packed),
            (shape.experts, shape.hidden, shape.intermediate // packed),
            shape.top_k,
            shape.dtype,
            tokens,
            block_shape=block,
        )
        assert vllm_row(shape, device.name, tokens) == theirs, tokens


def test_a_row_that_does_not_fit_is_left_out_and_harms_nothing(device: Any) -> None:
    from vllm.model_executor.layers.fused_moe import get_config

    from vllm_spark.tune.fused_moe.problem import FusedMoeProblem
    from vllm_spark.tune.fused_moe.search import weights_of
    from vllm_spark.tune.search import runs

    large = FusedMoeParameters(BLOCK_SIZE_M=16, BLOCK_SIZE_N=256, BLOCK_SIZE_K=256, num_warps=4, num_stages=8)
    with weights_of(BF16) as layers:
        problem = FusedMoeProblem(BF16, layers, 1, 2, 1, device.name)
        before = problem.call(0, None)
        assert not runs(problem, large, "the kernel")
        assert get_config() is None
        assert runs(problem, None, "the kernel")
        assert torch.equal(problem.call(0, None), before)


def test_a_kernel_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_spark.tune import timing
    from vllm_spark.tune.search import runs

    class Sleeper:
        """Its kernel takes seconds."""

        def run(self, parameters: str) -> None:
            torch.cuda._sleep(10_000_000_000)

        def call(self, call: int, parameters: str) -> torch.Tensor:
            self.run(parameters)
            return torch.empty(0)

    monkeypatch.setattr(timing, "MAX_KERNEL_SECONDS", 0.2)
    try:
        with pytest.raises(timing.HangError, match="'in the search'"):
            runs(Sleeper(), "in the search", "the kernel")
        assert not torch.cuda.current_stream().query(), "it runs on"
        with pytest.raises(timing.HangError, match="'in a race'"):
            timing.time_in_turns({"in a race": lambda: Sleeper().run("")}, 1, 1)
        assert not torch.cuda.current_stream().query()
    finally:
        torch.cuda.synchronize()


def test_a_gpu_without_room_is_told() -> None:
    from vllm_spark.tune.fused_moe import search as fused_moe_search
    from vllm_spark.tune.marlin import search as marlin_search

    huge = BF16.model_copy(update={"experts": 512, "hidden": 16_384, "intermediate": 16_384})
    with pytest.raises(SparkError, match="GiB free"), fused_moe_search.weights_of(huge):
        pass
    wide = MARLIN["moe_w13"].model_copy(update={"experts": 512, "size_n": 65_536, "size_k": 65_536})
    with pytest.raises(SparkError, match="GiB free"), marlin_search.weights_of(wide):
        pass


def test_ctrl_c_keeps_what_is_done(tmp_path: Path, device: Any) -> None:
    from vllm_spark.tune.journal import Journal
    from vllm_spark.tune.tuner import tune

    versions = {"vllm": "any"}
    shapes: list[Shape] = [MARLIN["moe_w13"], BF16]
    seen: list[Outcome] = []

    def stop_at_the_third(outcome: Outcome) -> None:
        seen.append(outcome)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tune(shapes, (1, 2), device, Journal(tmp_path, device.name, versions), stop_at_the_third)
    kept = Journal(tmp_path, device.name, versions).known()
    assert kept == {(outcome.shape, outcome.rows): outcome for outcome in seen}
    assert len(kept) == 3
    all_of_them = tune(shapes, (1, 2), device, Journal(tmp_path, device.name, versions), lambda outcome: None)
    assert all_of_them[:3] == seen, "not measured again"
    assert len(all_of_them) == 4


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user without tables; what was read is forgotten afterwards."""
    from vllm_spark.kernels import lookup

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    lookup.clear_cache()
    yield tmp_path / "home"
    lookup.clear_cache()


def tune_command(*words: str) -> int:
    from vllm_spark.cli import tune as command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words))


@pytest.mark.usefixtures("home")
def test_the_command_writes_tables_that_serving_finds(
    tmp_path: Path, device: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_spark.kernels import lookup
    from vllm_spark.kernels.fused_moe.check import check_fused_moe_table

    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plot = str(tmp_path / "plot.svg")
    assert tune_command(str(tmp_path), "--tp", "2", "--rows", "1,4,8", "--no-decode", "--plot", plot) == 0
    printed = capsys.readouterr().out
    assert "Written:" in printed
    assert "--moe-backend triton" in printed
    assert (tmp_path / "plot.svg").stat().st_size > 0
    found = lookup.find_fused_moe_table(device.name, 8, 256, None, None)
    assert found is not None
    path, rows, _ = found
    assert {1, 4, 8, 9, 16, 1024} <= set(rows)
    assert [each for each in check_fused_moe_table(path, None, None) if each.kind == "error"] == []


@pytest.mark.timeout(1800)
def test_the_command_compares_decode_steps_and_keeps_what_became_faster(
    tmp_path: Path, home: Path, device: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, with real engines of a tiny model."""
    from vllm_spark.kernels import lookup
    from vllm_spark.kernels.fused_moe.check import check_fused_moe_table
    from vllm_spark.models.tiny import make_tiny_model
    from vllm_spark.tune.journal import Journal, installed_versions

    model = make_tiny_model(tmp_path / "model", "moe")
    config = json.loads((model / "config.json").read_text())
    config |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "moe_intermediate_size": 512}
    (model / "config.json").write_text(json.dumps(config))
    shape = FusedMoeExperts(experts=8, top_k=2, hidden=256, intermediate=256)
    # A table that would break every engine that reads it: the user's variable must not reach them.
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / shape.table.file_name(device.name)).write_text("{")
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(theirs))
    # Triton's attention is in every build of vLLM, and what the engines attend with is no matter here.
    engine = json.dumps({"gpu_memory_utilization": 0.3, "attention_backend": "TRITON_ATTN"})
    logs = tmp_path / "logs"
    words = [str(model), "--tp", "2", "--rounds", "1", "--engine", engine, "--keep-logs", str(logs), "--timeout", "800"]
    assert tune_command(*words, "--rows", "1,2,4,8") == 0
    printed = capsys.readouterr().out
    assert "A decode step of one rank of" in printed
    assert {path.name for path in (logs / "tp2").iterdir()} == {"untuned-0.log", "tuned-0.log"}
    found = lookup.find_fused_moe_table(device.name, 8, 256, None, None)
    assert found is not None
    path, rows, _ = found
    assert path.is_relative_to(home)
    journal = Journal(path.parents[1], device.name, installed_versions())
    kept = {number: each.outcome for (_, number), each in journal.kept().items()}
    searched = {number: each for (_, number), each in journal.known().items()}
    assert set(kept) == set(searched) == {1, 2, 4, 8}
    for number, outcome in kept.items():
        assert outcome in (searched[number], searched[number].with_default())
        assert outcome.parameters is None or isinstance(outcome.parameters, FusedMoeParameters)
        choice = outcome.parameters
        assert rows[number] == (vllm_row(shape, device.name, number) if choice is None else choice.row())
    assert [each for each in check_fused_moe_table(path, None, None) if each.kind == "error"] == []

    lookup.clear_cache()
    assert tune_command(*words[:3], "--rows", "1", "--no-decode") == 0
    again = lookup.find_fused_moe_table(device.name, 8, 256, None, None)
    assert again is not None
    assert {number: again[1][number] for number in (2, 4, 8)} == {number: rows[number] for number in (2, 4, 8)}
