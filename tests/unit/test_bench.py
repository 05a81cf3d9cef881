"""`vllm-spark bench` on CPU tensors: real ranks, real figures."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from ctypes.util import find_library
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from vllm_spark.bench import kernel_profile
from vllm_spark.bench.baseline import connect_baseline, gather_last
from vllm_spark.bench.collective import Report, Row, Settings
from vllm_spark.bench.collective_report import as_json, as_table, format_size
from vllm_spark.bench.decode import engine as decode_engine
from vllm_spark.bench.decode import measurement as decode
from vllm_spark.bench.decode import report as decode_report
from vllm_spark.bench.kernel_profile import KernelTime, short_name, summary
from vllm_spark.bench.machine_times import MachineTimes
from vllm_spark.bench.ranks import Rank, run_ranks
from vllm_spark.bench.wire import Plan
from vllm_spark.bench.wire_report import as_json as as_wire_json
from vllm_spark.bench.wire_report import as_tables, named
from vllm_spark.bench.wire_report import plot as plot_wire
from vllm_spark.cli import main
from vllm_spark.collective.link_model import WireModel
from vllm_spark.errors import SparkError
from vllm_spark.processes.managed import program
from vllm_spark.records import from_json, to_json

from .wires import wire_model

WIRE = wire_model()
BENCH = [program("vllm-spark"), "bench", "collective", "--device", "cpu"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BENCH, *arguments], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("collective", ["all_reduce", pytest.param("all_gather", marks=pytest.mark.thorough)])
def test_collective(collective: str, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "figures.png")]
    done = bench("--collective", collective, "--sizes", "1KiB,64KiB", "--samples", "2", *files)
    assert done.returncode == 0, done.stderr
    assert "64 KiB" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows = {(row["candidate"], row["bytes"]): row for row in figures["rows"]}
    assert rows.keys() == {
        (name, size) for name in ("direct", "proxied", "wire", "gloo") for size in (1 << 10, 64 << 10)
    }
    for row in rows.values():
        assert 0 < row["minimum"] <= row["median"] <= row["p99"]
        assert row["gbytes_per_s"] == pytest.approx(row["bytes"] / row["median"] / 1e3)
    assert figures["baseline"].startswith("gloo through torch.distributed")
    for heading in ("minimum", "median", "p99", "GB/s", "limit", "ratio"):
        assert heading in done.stdout
    # Not about speed: a message of 3.2 us of wire cannot take less.
    assert rows["wire", 1 << 10]["minimum"] > 3.2
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_gathering_logits(tmp_path: Path) -> None:
    done = bench("--collective", "logits_gather", "--samples", "1", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    assert "[8, 75968]" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {row["bytes"] for row in figures["rows"]} == {2 * 75968, 8 * 2 * 75968}
    assert {row["candidate"] for row in figures["rows"]} == {"direct", "proxied", "wire", "gloo"}


def test_ratios_are_to_the_baseline_over_host_memory_in_the_same_mode() -> None:
    medians = {("direct", "eager"): 10.0, ("direct", "graph"): 3.0, ("wire", "graph"): 6.0, ("nccl", "graph"): 4.0}
    medians |= {("nccl, host memory", "eager"): 20.0, ("nccl, host memory", "graph"): 12.0}
    rows = [Row(name, mode, 4096, 1.0, median, 99.0) for (name, mode), median in medians.items()]
    report = Report(Settings("cuda", (4096,)), "a machine", rows, "a library 1.2", copy_gbytes_per_s=4.096)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(as_table(report, "graph"))
    shown = console.export_text()
    assert "nccl, host memory: a library 1.2" in shown
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert cells == [
        ["4 KiB", "direct", "3.0", "99.0", "0.25", "", "1.0", "1.37", "33%"],
        ["", "wire", "6.0", "99.0", "0.50", "2.8", "1.0", "0.68", "17%"],
        ["", "nccl", "4.0", "99.0", "0.33", "", "1.0", "1.02", "25%"],
        ["", "nccl, host memory", "12.0", "99.0", "1.00", "", "1.0", "0.34", "8%"],
    ]


def test_published_figures_stand_beside_the_modelled_wire() -> None:
    rows = [Row(name, "graph", 8192, 1.0, 9.0, 10.0) for name in ("wire", "gloo")]
    report = Report(Settings("cpu", (8192,)), "a machine", rows, "a library 1.2", copy_gbytes_per_s=10)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(as_table(report, "graph", peers=True))
    shown = console.export_text()
    wire, gloo = (line for line in shown.splitlines() if line.startswith("│"))
    assert "3.2 │ │9.1 sparknet, 9.55 libsircl" in " ".join(wire.split())
    assert "sparknet" not in gloo
    assert " ".join(shown.split()).count("two DGX Spark") == 2, "the caption says where and when"


def test_a_figure_with_a_gb10s_times_in_the_place_of_the_machines() -> None:
    rows = [Row(name, mode, 8192, 1.0, 9.0, 10.0) for name in ("wire", "nccl") for mode in ("eager", "graph")]
    times = MachineTimes(round_trip=2.66, kernel=1.17)
    report = Report(Settings("cuda", (8192,)), "a machine", rows, "a library 1.2", 10.0, times)
    for mode, expected in (("graph", "3.2 │ 7.0 │9.1"), ("eager", "3.2 │ │9.1")):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(as_table(report, mode, peers=True))
        shown = console.export_text()
        assert expected in " ".join(shown.split())
        assert "(2.66 us and 1.17 us; published for a GB10" in " ".join(shown.split())
    assert json.loads(as_json(report))["machine_times_us"] == {"round_trip": 2.66, "kernel": 1.17}


def check_baseline(rank: Rank) -> None:
    import torch

    baseline = connect_baseline(rank, "cpu")
    mine = torch.arange(6.0).reshape(2, 3) + 10 * rank.index
    expected = torch.tensor([[0.0, 1, 2, 10, 11, 12], [3, 4, 5, 13, 14, 15]])
    if not gather_last(baseline, mine).equal(expected):
        raise SparkError("the baseline gathers something else than we do")
    baseline.all_reduce(mine)
    baseline.close()
    rank.report("right")


def test_the_baseline_does_the_same_work() -> None:
    said: list[Any] = []
    run_ranks(check_baseline, on_report=said.append)
    assert said == ["right", "right"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--collective", "logits_gather", "--sizes", "1KiB"],
            "--sizes cannot be combined with --collective logits_gather",
        ),
        (["--sizes", "3KB"], "'3KB' is not a size; write 4096, 4KiB or 1MiB"),
        (["--sizes", "65MiB"], "65MiB is out of range"),
        (["--samples", "0"], "'0' is not a whole number above 0"),
        (
            ["--latency-us", "-1"],
            "argument --latency-us: loopback_latency_us -1 is invalid: must be a number from 0 to 1000000",
        ),
        (["--gbytes-per-s", "20000"], "loopback_gbytes_per_s 20000 is invalid: must be a number from 0 to 10000"),
        (["--json", "~no-such-user/x"], "there is no home folder for '~no-such-user/x'"),
        (["--wire", "/no/such/wire"], "the wire model /no/such/wire cannot be read"),
        (["--wire", "x", "--gbytes-per-s", "1"], "--wire x and --gbytes-per-s contradict each other"),
        (["--plot", "figures.abc"], "--plot figures.abc must end in .png, .svg, .pdf"),
        (["--json", "/no/such/folder/x"], "/no/such/folder is not a writable folder"),
        (["--device", "cuda"], "--device cuda needs 2 GPUs, one for each rank, and this machine has"),
    ],
)
def test_bad_input(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if "cuda" in arguments and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        pytest.skip("this machine has two GPUs")
    assert main(["bench", "collective", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_ctrl_c_and_kill_leave_no_rank() -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        started = subprocess.Popen(
            [*BENCH, "--samples", "100000"],
            stdout=subprocess.DEVNULL,
            # A shell's background job ignores Ctrl-C, and so does whatever it starts: these tests, perhaps.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        ranks = wait_for_ranks(started.pid)
        os.kill(started.pid, number)
        started.wait(20)
        assert not psutil.wait_procs(ranks, 20)[1]


def wait_for_ranks(parent: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = psutil.Process(parent).children(recursive=True)
        ranks = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        if len(ranks) == 2:
            return ranks
        time.sleep(0.1)
    raise AssertionError("no ranks in a minute")


def fail_on_one_rank(rank: Rank) -> None:
    if rank.index == 1:
        raise SparkError("a reason")
    rank.exchange(b"")


def die_on_one_rank(rank: Rank) -> None:
    if rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.exchange(b"")


def hang(rank: Rank) -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (fail_on_one_rank, "rank (1 failed: a reason|0 failed: the other rank ended)"),
        (die_on_one_rank, "rank (1 exited without a result|0 failed: the other rank ended)"),
        (hang, "did not end within 2 s"),
    ],
)
def test_ranks_that_fail(body: Any, sentence: str) -> None:
    with pytest.raises(SparkError, match=sentence):
        run_ranks(body, timeout=2.0 if body is hang else 60.0, on_report=lambda value: None)


@pytest.mark.parametrize(("size", "text"), [(2, "2 B"), (1024, "1 KiB"), (1536, "1536 B"), (8 << 20, "8 MiB")])
def test_sizes_in_words(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--candidates", "tp1,nccl", "--device", "cpu"],
            "no candidate 'nccl' for --device cpu; choose from tp1, spark",
        ),
        (["--candidates", ""], "no candidate ''"),
        (["--model", "/nowhere"], "--model /nowhere is not a folder with a config.json; give one, or one of "),
        (["--batches", "1,0"], "'0' is not a whole number above 0"),
        (["--engine", "[]"], "'[]' is not a JSON object"),
        (["--latency-us", "2e9"], "loopback_latency_us 2e9 is invalid: must be a number from 0 to 1000000"),
        (["--wire", "/no/such/wire"], "the wire model /no/such/wire cannot be read"),
        (["--json", "/no/such/folder/x"], "/no/such/folder is not a writable folder"),
        (["--device", "cuda"], "--device cuda: this machine has no GPU"),
        (["--device", "cpu", "--profile"], "--profile is about GPUs; it needs --device cuda"),
        (["--device", "cpu", "--one-gpu"], "--one-gpu is about GPUs; it needs --device cuda"),
        (["--device", "cuda", "--one-gpu", "--candidates", "tp1,nccl"], "nccl cannot run with --one-gpu"),
    ],
)
def test_bad_input_for_decode(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm")
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["bench", "decode", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "one of the arguments --listen --connect is required"),
        (["--listen", "--connect", "10.0.0.1"], "not allowed with argument"),
        (["--connect", "desk"], "'desk' is not an IP address"),
        (["--connect", "10.0.0.1", "--sizes", "2"], "--sizes is an option of the machine"),
        (["--connect", "10.0.0.1", "--bandwidth-sizes", "4"], "--bandwidth-sizes is an option of the machine"),
        (["--connect", "10.0.0.1", "--traffic-class", "4"], "--traffic-class is an option of the machine"),
        (["--listen", "--depth", "513"], "--depth 513 is too many; give at most 512"),
        (["--listen", "--samples", "1000001"], "--samples 1000001 is too many; give at most 1000000"),
        (["--listen", "--sizes", "3"], "3 is out of range; sizes are even"),
        (["--listen", "--output", "/no/such/folder/x"], "/no/such/folder is not a writable folder"),
        (["--listen", "--plot", "figures.abc"], "--plot figures.abc must end in"),
        (["--listen", "--rails", "nothing:1"], "there is no RDMA port nothing:1"),
    ],
)
def test_bad_input_for_wire(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm_spark._native")
    if "--rails" in arguments and find_library("ibverbs") is None:
        sentence = "RDMA needs libibverbs.so.1, which cannot be opened"
    assert main(["bench", "wire", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("side", [["--listen"], ["--connect", "10.0.0.1"]])
def test_no_wire_without_rdma(side: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from vllm_spark.collective import CollectiveError, local_ports

    with contextlib.suppress(CollectiveError):  # no libibverbs
        if local_ports():
            pytest.skip("this machine has RDMA")
    assert main(["bench", "wire", *side]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (sentence,) = printed.err.splitlines()
    assert re.match(r"vllm-spark: (this machine has no active RDMA port|RDMA needs libibverbs)", sentence)


def test_a_wire_models_figures_as_tables_and_json(tmp_path: Path) -> None:
    rails = [rail.model_copy(update={"devices": (f"mlx5_{n}:1", "roce0:1")}) for n in (0, 1) for rail in WIRE.rails]
    model = WIRE.model_copy(update={"rails": tuple(rails)})
    console = Console(width=120, record=True, file=io.StringIO())
    for table in as_tables(Plan(samples=50, depth=3), model):
        console.print(table)
    shown = console.export_text()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    assert cells == [
        ["4 KiB", "rail 0", "3.00", "3.20", "4.00", "5.00"],
        ["", "rail 1", "3.00", "3.20", "4.00", "5.00"],
        ["", "all rails", "3.00", "3.20", "4.00", "5.00"],
        ["1 MiB", "rail 0", "24", "24.5", "192"],
        ["", "rail 1", "24", "24.5", "192"],
        ["", "all rails", "24", "24.5", "192"],
        ["rail 0", "mlx5_0:1 to roce0:1", "4096", "3.00", "24", "0%"],
        ["rail 1", "mlx5_1:1 to roce0:1", "4096", "3.00", "24", "0%"],
        ["all rails", "", "", "3.00", "24", "0%"],
    ]
    assert "50 round trips of each size" in shown
    assert "1000 writes of each size, 3 outstanding on each rail" in " ".join(shown.split())
    assert [name for name, _ in named(WIRE)] == ["rail 0"], "one rail is all of them"
    content = json.loads(as_wire_json(Plan(depth=3), model))
    assert content["settings"]["depth"] == 3
    assert WireModel.model_validate(content["wire"]) == model
    plot_wire(model, tmp_path / "figures.svg")
    assert "as loopback models it" in (tmp_path / "figures.svg").read_text()


def test_calibration_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU; tests/gpu calibrates it")
    assert main(["bench", "calibrate"]) == 2
    assert "calibration needs a GPU" in capsys.readouterr().err


def test_a_candidate_on_gpus_decides_for_itself_whether_it_is_a_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's settings of vLLM hold for all; those of a pair or of a launcher would falsify what is compared."""
    pairs = {
        "VLLMSPARK_ENABLE": "1",
        "VLLMSPARK_LOOPBACK_MODE": "proxied",
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "SPARK_PORT": "4711",  # an old name
    }
    for name, value in {**pairs, "VLLM_MLA_DISABLE": "1", "VLLM_TUNED_CONFIG_FOLDER": "/t", "HOME": "/h"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(decode, "_visible_gpus", lambda: ["4", "7"])
    settings = decode.Settings("cuda", "any", ("tp1",))
    for name, candidate in decode.candidates_for("cuda").items():
        for rank in range(candidate.ranks):
            given = decode._environment(settings, candidate, rank)
            assert not pairs.keys() & given.keys(), name
            assert (given["VLLM_MLA_DISABLE"], given["HOME"]) == ("1", "/h")
            assert ("VLLM_TUNED_CONFIG_FOLDER" in given) == (name not in decode.TUNING)
            if candidate.ranks == 1 or candidate.spark is not None:
                assert given["CUDA_VISIBLE_DEVICES"] == ("4", "7")[rank]


def _decoded(tokens: list[list[int]], logprobs: list[list[float | None]]) -> decode.Row:
    with_tokens = [list(zip(*both, strict=False)) for both in zip(tokens, logprobs, strict=True)]
    return decode.Row("one", len(tokens), 1.0, 1.0, 1.0, [1.0], tokens, with_tokens)


@pytest.mark.parametrize(
    ("tokens", "logprobs", "expected"),
    [
        ([[1, 2, 3], [4, 5, 6]], [[-1.0, -2.0], [-1.0, -2.0]], "all"),
        ([[1, 2, 3], [4, 5, 6]], [[-1.0, -2.0], [-1.0, -2.5]], "all, logprobs ± 0.5"),
        ([[1, 2, 3], [4, 5, 6]], [[-1.0, -2.0], [-1.0, None]], "all, logprobs ± inf"),
        ([[1, 2, 3], [4, 7, 6]], [[-1.0, -2.0], [-1.0, -2.25]], "first 1, logprobs ± 0.2"),
        ([[1, 2, 3], [7, 5, 6]], [[-1.0, -2.0], [-1.0, -9.0]], "first 0"),  # what follows another token may differ
    ],
)
def test_agreement_of_tokens(tokens: list[list[int]], logprobs: list[list[float | None]], expected: str) -> None:
    reference = _decoded([[1, 2, 3], [4, 5, 6]], [[-1.0, -2.0], [-1.0, -2.0]])
    assert decode_report.agreement(_decoded(tokens, logprobs), reference) == expected


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::(anonymous namespace)::f<float, g<4> >(int, h<5>)", "at::native::f"),
        ("all_reduce_packets_bfloat16", "all_reduce_packets_bfloat16"),
        ("Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH"),
    ],
)
def test_names_of_kernels(name: str, short: str) -> None:
    assert short_name(name) == short


def test_kernels_of_a_step() -> None:
    def event(key: str, count: int, time: float) -> SimpleNamespace:
        return SimpleNamespace(key=key, count=count, self_device_time_total=time)

    profile = summary([event("void f<1>()", 10, 40.0), event("void f<2>()", 10, 20.0), event("g", 5, 100.0)], 5)
    assert profile.kernels == [KernelTime("g", 1, 20.0), KernelTime("f", 4, 12.0)]
    assert profile.busy == 32
    report = decode.Report(decode.Settings("cuda", "m", ("spark",)), profiles={"spark": profile})
    report.rows.append(decode.Row("spark", 1, 0.1, 0.1, 0.1, [0.1], [], []))
    file = io.StringIO()
    Console(file=file, width=100).print(*decode_report.profile_tables(report))
    shown = file.getvalue()
    assert "32 us of a step of 100" in shown
    assert re.search(r"f +│ +4 │ +12 │ +3.0", shown)


ENGINE_THAT_FAILS_LATE = """#!{python}
import sys, time
from pathlib import Path
from vllm_spark.bench.decode.engine import Result
from vllm_spark.files import atomic_write_text
from vllm_spark.records import to_json
result = Result("0.32.0", 1.0, {{1: [2.0] * 3}}, {{1: [[1]]}}, {{1: [[(1, 0.0)]]}}, None)
atomic_write_text(Path(sys.argv[-1]), to_json(result).decode(), "result")
{then}
"""


@pytest.mark.parametrize(
    ("then", "why"),
    [
        ("sys.exit(3)", "tp1: the engine ended with exit code 3 before it had shut down"),
        ("time.sleep(300)", "tp1: the engine has not shut down within 0.5 s"),
        ("", ""),
    ],
)
def test_an_engine_that_fails_late_keeps_its_figures(
    then: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    engine = tmp_path / "engine"
    engine.write_text(ENGINE_THAT_FAILS_LATE.format(python=sys.executable, then=then))
    engine.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(engine))
    monkeypatch.setattr(decode, "_SHUTDOWN_SECONDS", 0.5 if "sleep" in then else 60.0)
    file = tmp_path / "figures.json"
    words = ["--device", "cpu", "--batches", "1", "--steps", "3", "--candidates", "tp1", "--timeout", "20"]
    assert main(["bench", "decode", *words, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert [row["median"] for row in figures["rows"]] == [2.0]
    assert figures["failed_ends"] == ({"tp1": why} if why else {})
    shown = " ".join(capsys.readouterr().out.split())
    assert ("after its measurements were complete; --keep-logs" in shown) == bool(why)
    assert why in shown


def test_figures_are_written_before_an_engine_shuts_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shutdown() -> None:
        raise RuntimeError("the other rank is gone")

    engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=shutdown))
    vllm = SimpleNamespace(__version__="0.32.0", LLM=lambda: SimpleNamespace(llm_engine=engine))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(decode_engine, "decode", lambda *given, **named: decode_engine.Decoded([2.0], [[1]], [[]]))
    job, result = tmp_path / "job", tmp_path / "result"
    job.write_bytes(to_json(decode_engine.Job({}, [1], 4, 1, 0)))
    monkeypatch.setattr(sys, "argv", ["decode_engine", str(job), str(result)])
    with pytest.raises(RuntimeError, match="the other rank is gone"):
        decode_engine.main()
    assert from_json(result.read_bytes(), decode_engine.Result).milliseconds == {1: [2.0]}


@pytest.mark.parametrize(("whole", "expected"), [(2, [KernelTime("all_reduce", 97.0, 1940.0)]), (1, None)])
def test_the_profile_is_rank_0s(whole: int, expected: list[KernelTime] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank records nothing, and what was begun is ended, also where a step is missing."""
    torch = pytest.importorskip("torch")
    events = [SimpleNamespace(key="all_reduce", count=2 * 97, self_device_time_total=2 * 1940.0)]
    order: list[str] = []
    profiler = SimpleNamespace(
        start=lambda: order.append("start"), stop=lambda: order.append("stop"), key_averages=lambda: events
    )
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profiler)

    def call_workers(function: Any, args: tuple[Any, ...] = ()) -> list[Any]:
        return [function(SimpleNamespace(rank=rank), *args) for rank in (0, 1)]

    def run_step() -> bool:
        order.append("step")
        return order.count("step") <= whole

    profile = kernel_profile.profile_steps(call_workers, run_step, 2)
    assert (profile and profile.kernels) == expected
    assert order == ["start", "step", "step", "stop"]


def test_what_was_measured_stays_when_a_later_candidate_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")

    def run(name: str, *_: object) -> decode_engine.Result:
        if name == "spark":
            raise SparkError("it failed")
        times = [2.0] * (2 if name == "stock" else 3)
        return decode_engine.Result("0.32.0", 1.0, {1: times}, {1: [[1]]}, {1: [[(1, 0.0)]]}, None)

    monkeypatch.setattr(decode, "_run", run)
    file = tmp_path / "figures.json"
    arguments = ["--device", "cpu", "--batches", "1", "--steps", "3", "--json", str(file)]
    assert main(["bench", "decode", *arguments, "--candidates", "stock"]) == SparkError("").exit_code
    assert "stock: at batch 1, only 2 steps had a token of every sequence, and 3 are" in capsys.readouterr().err
    assert not file.exists() or file.read_text() == ""
    assert main(["bench", "decode", *arguments, "--candidates", "tp1,spark,stock"]) == SparkError("").exit_code
    shown = capsys.readouterr()
    assert "NOT COMPLETE: spark, stock did not run" in " ".join(shown.out.split())
    assert "it failed" in shown.err
    figures = json.loads(file.read_text())
    assert [row["candidate"] for row in figures["rows"]] == ["tp1"]
    assert figures["missing"] == ["spark", "stock"]
