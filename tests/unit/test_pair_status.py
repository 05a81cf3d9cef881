"""The status of a pair: its records, the table and the lines, and what `vllm-spark status` prints without a pair."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import psutil
import pytest
from rich.console import Console

from vllm_spark.backend.pair_status.readings import Sensors
from vllm_spark.backend.pair_status.records import PairFacts, RailFacts, RankFacts, Readings
from vllm_spark.backend.pair_status.report import PATH, StatusReport
from vllm_spark.backend.pair_status.table import lines, show_table
from vllm_spark.backend.status import EngineStatus, RankCounters
from vllm_spark.cli import main
from vllm_spark.errors import EXIT_LOST, EXIT_USAGE, SparkError
from vllm_spark.processes.local import free_ports
from vllm_spark.records import from_json, to_json

GIB = 1 << 30
RAILS = [RailFacts("rocep1s0f0", 1, "100 Gb/s", 4096), RailFacts("roceP2p1s0f0", 1, "", 4096)]
LEADER = RankFacts(
    rank=0,
    host="desk1",
    process=4711,
    device="NVIDIA GB10",
    versions={"vllm_spark": "0.1.0", "vLLM": "0.32.0", "torch": "2.11.0", "Python": "3.12"},
    tables=["E=128,N=384,device_name=NVIDIA_GB10,dtype=int4_w4a16.json (/home/user/.local/state/vllm-spark/fused_moe)"],
    rails=RAILS,
    weights=15 * GIB,
    kv_cache=20 * GIB,
    region=40 << 20,
    reserve=8 * GIB,
    memory=120 * GIB,
)
FOLLOWER = replace(LEADER, rank=1, host="desk2", process=42, tables=[], kv_cache=None)
PATH_OF_DATA = "over verbs on rail 0 (rocep1s0f0) and rail 1 (roceP2p1s0f0)"
FACTS = PairFacts("Qwen/Qwen3-30B-A3B", PATH_OF_DATA, 16384, "10.0.0.1:29650", 1.7e9, [LEADER, FOLLOWER])
COUNTERS = RankCounters(
    0,
    steps=1234567,
    all_reduces=99000000,
    all_reduce_bytes=4 * 10**11,
    wait_seconds=7.25,
    rails_up=2,
    rail_posts=(7, 7),
)
READINGS = Readings(60 * GIB, 61.0, 2418.0, 3003.0, 55.5, 2800.0, 3900.0)
REPORT = StatusReport(
    "http://localhost:8000",
    FACTS,
    [COUNTERS, replace(COUNTERS, rank=1, rails_up=1, rails_held_down=1, rail_failures=3)],
    [READINGS, None],
)


def table(report: StatusReport, width: int, *, now: bool) -> list[str]:
    stream = io.StringIO()
    show_table(report, Console(file=stream, width=width, force_terminal=True, color_system=None), now=now)
    return stream.getvalue().splitlines()


def by_label(report: StatusReport, *, now: bool = True) -> dict[str, str]:
    _, *rows = lines(report, now=now)
    return dict(row.split(": ", 1) for row in rows)


def test_the_lines_say_what_is_known_and_what_is_not() -> None:
    title, *_ = lines(REPORT, now=True)
    assert title == "Qwen/Qwen3-30B-A3B is served by desk1 (leader) and desk2 (follower)"
    rows = by_label(REPORT)
    assert rows["machine"] == "desk1 (leader, process 4711) | desk2 (follower, process 42)"
    assert rows["versions"] == "vllm_spark 0.1.0, vLLM 0.32.0, torch 2.11.0, Python 3.12"
    assert rows["memory (GiB)"] == (
        "weights 15.0, KV cache 20.0, region 0.04, desktop 8.0 of 120.0 | "
        "weights 15.0, KV cache not known, region 0.04, desktop 8.0 of 120.0"
    )
    assert rows["kernel tables"].endswith("fused_moe) | none, vLLM's own choice")
    assert rows["rails"] == "rocep1s0f0:1 100 Gb/s, roceP2p1s0f0:1 rate not known"
    assert rows["available now"] == "60.0 of 120.0 GiB | not known"
    assert rows["GPU"] == "61 °C, 2,418 of 3,003 MHz | not known"
    assert rows["processor"] == "56 °C, 2,800 of 3,900 MHz | not known"
    assert rows["steps"] == "1,234,567"
    assert rows["collectives"] == "99,000,000 all-reduces (400.0 GB), 0 all-gathers (0.0 MB)"
    assert rows["waited"] == "7.2 s for the other rank"
    assert rows["rails now"] == (
        "2 up; failed 0 times, recovered 0; 0 messages sent again | "
        "1 up, 1 held down; failed 3 times, recovered 0; 0 messages sent again"
    )
    assert rows["protocol"] == "LL up to 16,384 bytes, Simple above; RDMA packets of 4,096 bytes"
    assert rows["ports"] == "follower at 10.0.0.1:29650, clients at http://localhost:8000"
    assert rows["is it used"] == (
        f"yes: 99,000,000 collectives of each rank went {PATH_OF_DATA}, and none took vLLM's own path"
    )


def test_the_start_table_has_nothing_that_changes() -> None:
    start = by_label(REPORT, now=False)
    assert start.items() <= by_label(REPORT).items()
    assert not {"steps", "waited", "GPU", "processor", "fall-backs", "serves since"} & start.keys()


@pytest.mark.parametrize(
    ("counters", "use"),
    [
        ([], "not yet: no collective has run"),
        ([COUNTERS, RankCounters(1)], "not yet: no collective has run"),
        ([RankCounters(0, fallbacks=5)], "no: vLLM's own path is used"),
        ([replace(COUNTERS, fallbacks=2), replace(COUNTERS, rank=1, fallbacks=3)], "and 5 took vLLM's own path"),
    ],
)
def test_whether_it_is_used(counters: list[RankCounters], use: str) -> None:
    assert use in by_label(replace(REPORT, counters=counters), now=False)["is it used"]


@pytest.mark.parametrize("now", [False, True])
@pytest.mark.parametrize("width", [80, 160])
def test_the_table_fits_and_has_every_row(width: int, now: bool) -> None:
    shown = table(REPORT, width, now=now)
    print("\n".join(shown))
    assert max(map(len, shown)) <= width
    text = " ".join("".join(shown).split())
    assert [label for label in by_label(REPORT, now=now) if label not in text] == []
    assert "desk1" in text
    assert "desk2" in text


def test_shared_memory_has_no_rails() -> None:
    report = replace(REPORT, counters=[replace(COUNTERS, rail_posts=(), rails_up=0)])
    assert by_label(report)["rails now"] == "none | not known"


def test_a_follower_that_is_not_described_has_no_column() -> None:
    alone = replace(REPORT, facts=replace(FACTS, ranks=[LEADER]))
    assert "follower" not in by_label(alone)["machine"]
    assert table(alone, 80, now=True)


def test_names_of_the_other_machine_cannot_move_the_cursor() -> None:
    evil = replace(FACTS, ranks=[LEADER, replace(FOLLOWER, host="desk\x1b[2J\n2", device="GPU\r")])
    for shown in (*lines(replace(REPORT, facts=evil), now=True), *table(replace(REPORT, facts=evil), 160, now=True)):
        assert "\x1b[2J" not in shown
        assert "\r" not in shown
    assert len(list(lines(replace(REPORT, facts=evil), now=True))) == len(list(lines(REPORT, now=True)))


def test_markup_is_shown_as_it_is() -> None:
    odd = replace(FACTS, ranks=[replace(LEADER, tables=["[red]x[/]"]), FOLLOWER])
    assert "[red]x[/]" in "".join(table(replace(REPORT, facts=odd), 160, now=False))


def test_a_status_keeps_facts_and_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    status = EngineStatus.create()
    try:
        assert StatusReport.of(status, "x") == StatusReport("x", None, [], [None, None])
        many = replace(FACTS, ranks=[replace(LEADER, tables=[LEADER.tables[0]] * 20), FOLLOWER])
        status.write_facts(many)
        status.write(COUNTERS)
        status.write_readings(1, READINGS)
        seen = EngineStatus.from_environment()
        report = StatusReport.of(seen, "x")
        assert report == StatusReport("x", many, [COUNTERS], [None, READINGS])
        assert from_json(to_json(report), StatusReport) == report
        seen.fail(SparkError("the cable is out"))
        assert StatusReport.of(status, "x").failure == "the cable is out"
        status.clear()
        assert StatusReport.of(status, "x") == StatusReport("x", None, [], [None, None])
    finally:
        status.unpublish()


def test_sensors_read_this_machine() -> None:
    sensors = Sensors()
    assert sensors.readings == Readings()
    sensors.start()
    deadline = time.monotonic() + 60  # it imports vLLM first
    while sensors.readings == Readings() and time.monotonic() < deadline:
        time.sleep(0.05)
    sensors.stop()
    assert sensors.readings.memory_available is not None
    assert 0 < sensors.readings.memory_available < psutil.virtual_memory().total
    sensors.join(20)
    assert not sensors.is_alive()


class Leader(BaseHTTPRequestHandler):
    """Answers as a leader's server does, or as `answers` says."""

    answers: dict[str, tuple[int, bytes]]

    def do_GET(self) -> None:
        authorized = self.headers.get("Authorization") == "Bearer sesame"
        code, content = self.answers.get(self.path, (404, b"")) if authorized else (401, b"")
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def server(answers: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    handler = type("Handler", (Leader,), {"answers": answers})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            thread.join(20)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "sesame")


def test_the_command_prints_lines_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    started = replace(REPORT, facts=replace(FACTS, started=time.time() - 3700))
    with server({PATH: (200, to_json(started))}) as url:
        for address in (url, f"{url}/", f"{url}/v1", url.removeprefix("http://")):
            assert main(["status", "--url", address]) == 0
            assert "(1 h 01 min)" in capsys.readouterr().out
        assert main(["status", "--url", url, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["facts"]["model"] == "Qwen/Qwen3-30B-A3B"


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ({}, "has no status of a pair (HTTP status 404); give with --url the address of vllm serve with --spark"),
        ({PATH: (200, b"<html>")}, "is not a status ("),
        (
            {PATH: (200, to_json(replace(REPORT, facts=None)))},
            "serves no pair now, its engine has not started yet",
        ),
        (
            {PATH: (200, to_json(replace(REPORT, facts=None, failure="the cable is out")))},
            "serves no pair now, its engine has failed: the cable is out",
        ),
        ({PATH: (200, to_json(replace(REPORT, facts=replace(FACTS, started=1e300))))}, "is not a status ("),
    ],
)
def test_what_is_no_status_is_one_sentence(
    answers: dict[str, tuple[int, bytes]], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(answers) as url:
        assert main(["status", "--url", url]) == EXIT_LOST
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert printed.err.count("\n") == 1


def test_an_engine_that_failed_is_shown_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with server({PATH: (200, to_json(replace(REPORT, failure="the cable is out")))}) as url:
        assert main(["status", "--url", url]) == EXIT_LOST
    assert "failed: the cable is out" in capsys.readouterr().out


def test_another_key_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("VLLM_API_KEY")
    with server({PATH: (200, to_json(REPORT))}) as url:
        assert main(["status", "--url", url]) == EXIT_LOST
        assert f"{url} requires another API key" in capsys.readouterr().err
        assert main(["status", "--url", url, "--api-key", "sesame"]) == 0


@pytest.mark.parametrize("key", ["ses\name", "Ключ"])
def test_a_key_that_no_header_can_have_is_one_sentence(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the key, which is a secret."""
    with server({PATH: (200, to_json(REPORT))}) as url:
        assert main(["status", "--url", url, "--api-key", key]) == EXIT_USAGE
    assert capsys.readouterr().err == (
        "vllm-spark: the API key of --api-key or VLLM_API_KEY is invalid: must consist of printable ASCII characters.\n"
    )


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    assert main(["status", "--url", f"http://127.0.0.1:{port}"]) == EXIT_LOST
    assert capsys.readouterr().err == (
        f"vllm-spark: no server answers at http://127.0.0.1:{port} (connection refused); start vllm serve with "
        "--spark, or give its address with --url.\n"
    )


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://desk1", "http://", "http://desk1:0", "http://desk1:99999", "http://[::1"),
        *("http://a..b", "http://desk1/ä", "http://desk1/a b", "http://me:key@desk1", "desk1:8000?x", "desk1#x"),
    ],
)
def test_a_url_that_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", url]) == EXIT_USAGE
    assert capsys.readouterr().err == f"vllm-spark: --url {url} is invalid: must be as http://localhost:8000.\n"
