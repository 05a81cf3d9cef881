"""A tuning session: comparisons of decode steps, what outlives a failure, and its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllm_spark.bench.decode import measurement as decode
from vllm_spark.bench.decode.engine import Result
from vllm_spark.errors import SparkError
from vllm_spark.kernels.devices import GB10
from vllm_spark.kernels.marlin.table import load_marlin_table
from vllm_spark.processes.group import process_group
from vllm_spark.tune import session
from vllm_spark.tune.decode_comparison import Comparison
from vllm_spark.tune.journal import Journal, Kept
from vllm_spark.tune.plan import Plan, TuningOptions
from vllm_spark.tune.report import outcomes_tables, plot
from vllm_spark.tune.results import (
    Outcome,
)
from vllm_spark.tune.session import Machine, TuningSession
from vllm_spark.tune.tuned_model import TunedModel

from .tuning_outcomes import (
    BF16,
    INT4,
    VERSIONS,
    W13,
    fused,
    marlin,
)

BOTH_SIZES: list[tuple[TunedModel, list[Any]]] = [
    (TunedModel("a", tp, []), [shape]) for tp, shape in ((1, W13), (2, BF16))
]
LABELS: dict[Any, list[str]] = {W13: ["a TP=1"], BF16: ["a TP=2"]}
MACHINE = Machine(GB10, "GPU-0", "NVIDIA GB10", VERSIONS)


def test_a_decode_steps_sides_take_turns_and_see_no_other_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[int, str]] = []

    def run(
        name: str, candidate: decode.Candidate, model: Path, given: decode.Settings, programs: Any, number: int
    ) -> Result:
        ran.append((number, name))
        environment = decode._environment(given, candidate, 0)
        assert "VLLM_TUNED_CONFIG_FOLDER" not in environment
        assert environment["XDG_CONFIG_HOME"] == "mine"
        return Result("0.32.0", 1.0, {1: [float(len(ran))] * given.steps}, {1: [[1]]}, {1: [[(1, 0.0)]]}, None)

    monkeypatch.setattr(decode, "_run", run)
    monkeypatch.setattr(decode, "_visible_gpus", lambda: ["0"])
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    environment = {"XDG_CONFIG_HOME": "mine"}
    given = decode.Settings("cuda", str(tmp_path), decode.TUNING, (1,), rounds=4, environment=environment)
    with process_group("test", Console(file=(tmp_path / "out").open("w"))) as programs:
        report = decode.measure(given, programs, lambda name, number: None)
    untuned, tuned = decode.TUNING
    names = [untuned, tuned, tuned, untuned] * 2
    assert ran == [(index // 2, name) for index, name in enumerate(names)]
    assert [row.medians for row in report.rows] == [[1.0, 4.0, 5.0, 8.0], [2.0, 3.0, 6.0, 7.0]]
    assert "VLLM_TUNED_CONFIG_FOLDER" in decode._environment(given, decode.candidates_for("cuda")["tp1"], 0)


def test_each_size_has_its_own_logs_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Path, float]] = []

    def compare(given: Any, programs: Any, on_engine: Any, on_note: Callable[[str], None]) -> list[Any]:
        seen.append((programs.logs, given.timeout))
        on_note("an engine failed at its end")
        return []

    monkeypatch.setattr(session, "compare", compare)
    options = TuningOptions("any", keep_logs=tmp_path / "logs", timeout=77)
    with (tmp_path / "out").open("w") as file:
        tuning = TuningSession(options, Plan({}, BOTH_SIZES, LABELS), tmp_path, MACHINE, Console(file=file))
        for model, shapes in BOTH_SIZES:
            assert tuning.decode_ratios(model, shapes, []) == {}
    assert seen == [(tmp_path / "logs" / "tp1", 77), (tmp_path / "logs" / "tp2", 77)]
    assert (tmp_path / "out").read_text().count("NOTE: an engine failed at its end") == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SparkError("an engine failed")])
def test_what_one_size_found_outlives_the_end_of_the_next(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=500, record=True, file=(tmp_path / "out").open("w"))
    tuning = TuningSession(TuningOptions("a"), Plan({}, BOTH_SIZES, LABELS), tmp_path, MACHINE, console)
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    compared: list[int] = []

    def compare(model: TunedModel, shapes: Any, candidates: Any) -> list[Comparison]:
        compared.append(model.tp)
        if model.tp == 2:
            raise error
        # Another tuner's results arrived during this comparison.
        journal.add_kept([Kept(marlin(8), ("b TP=1",))])
        return [Comparison(1, untuned=[1.0], tuned=[0.9])]

    monkeypatch.setattr(tuning, "_compare", compare)
    with pytest.raises(type(error)):
        tuning.write_tables([marlin(), fused()])
    assert compared == [1, 2]
    assert {(shape, rows) for shape, rows in journal.kept()} == {(W13, 1), (W13, 8)}
    path = tmp_path / "marlin" / W13.file_name(GB10.name)
    table = load_marlin_table(path)
    assert [number for number, row in table.rows.items() if not row.uses_default_tile] == [1, 8]
    assert set(table.models) == {"a TP=1", "b TP=1"}
    printed = console.export_text()
    assert f"Written: {path}" in printed
    assert ("Stopped: tables for 1 of 2 sizes are written" in printed) == isinstance(error, KeyboardInterrupt)


# The report


def test_a_report_has_a_table_for_each_kernel_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcomes: list[Outcome] = [marlin(1), marlin(8), fused(1), fused(8, 1.0, None, tried=()), fused(shape=INT4)]
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    for table in outcomes_tables(outcomes, "NVIDIA GB10"):
        console.print(table)
    text = console.export_text()
    for part in ("64 x 128, 2 blocks/SM", "16 x 32 x 128, 4 warps, 4 stages", "default", "0.900", "bfloat16", "int4"):
        assert part in text
    assert [str(table.title).split(",")[0] for table in outcomes_tables(outcomes[:2], "")] == ["Marlin"]
    path = tmp_path / "plot.png"
    plot(outcomes, "NVIDIA GB10", path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(SparkError, match=r"plot\.png cannot be written \(No space left.*--plot"):
        plot(outcomes, "NVIDIA GB10", path)
