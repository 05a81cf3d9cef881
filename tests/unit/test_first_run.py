"""Parts of the first run: options, limits of speed, the report, and the connection of both machines."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_spark.bench.connection import await_connection, open_connection
from vllm_spark.cli import main
from vllm_spark.collective import CollectiveError
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import EXIT_USAGE, PeerLostError
from vllm_spark.executor.channel.addresses import LOOPBACK
from vllm_spark.first_run.checked import CheckedCollectives
from vllm_spark.first_run.peer import Peer, PeerFailedError
from vllm_spark.first_run.report import Report, redacted
from vllm_spark.first_run.result import Advice, StepFailedError, StepResult
from vllm_spark.first_run.speed import check_latency, check_rates, check_two_way
from vllm_spark.processes.local import free_ports

PATIENCE = 60.0
SECRET = "the secret of these tests"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--listen"], "--listen is an option of --first-run; add --first-run"),
        (["--collectives", "5"], "--collectives is an option of --first-run"),
        (["--first-run"], "give --listen on one, and --connect with its address on the other"),
        (["--first-run", "--listen", "--json"], "use --report"),
        (["--first-run", "--listen", "--leader", "10.0.0.1"], "--leader does not go with --first-run; use --connect"),
        (["--first-run", "--connect", "10.0.0.1", "--pull"], "--pull is an option of the machine with --listen"),
        (["--first-run", "--connect", "10.0.0.1", "--address", "10.0.0.2"], "--address is an option of the machine"),
        (["--first-run", "--listen", "--collectives", "0"], "'0' is not a whole number above 0"),
        (["--first-run", "--peer"], "not allowed with argument"),
        (["--first-run", "--listen", "--report", "/proc/none/x.json"], "is not a writable folder"),
    ],
)
def test_options_that_do_not_fit(capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str) -> None:
    assert main(["doctor", *arguments]) == EXIT_USAGE
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("alone", "total", "limits_apply", "seen"),
    [
        ({"rail 0": 213.0, "rail 1": 212.0}, 380.0, True, None),
        (
            {"rail 0": 213.0, "rail 1": 119.0},
            380.0,
            True,
            "rail 1 reached 119.0 Gb/s in both directions",
        ),
        ({"rail 0": 213.0, "rail 1": 212.0}, 213.0, True, "all rails together reached 213.0 Gb/s"),
        ({"rail 0": 20.0, "rail 1": 19.0}, 30.0, False, None),
        ({"rail 0": 20.0, "rail 1": 5.0}, 25.0, False, "rail 1 reached 5.0 Gb/s in both directions, and rail 0 20.0"),
    ],
)
def test_two_way_rates(alone: dict[str, float], total: float, limits_apply: bool, seen: str | None) -> None:
    """The figures are those of good and bad cables between GB10 machines."""
    warning = check_two_way(alone, total, limits_apply)
    assert (warning is None) == (seen is None)
    if warning is not None and seen is not None:
        assert warning[0].startswith(seen)
        assert "cable" in warning[1].remedy


def test_rates_of_one_direction_and_latencies() -> None:
    ways = {"there": 92.6, "back": 97.3}
    assert check_rates("rail 0", ways, 1, limits_apply=True) is None
    assert check_rates("both", ways, 2, limits_apply=False) is None
    slow = check_rates("both", ways, 2, limits_apply=True)
    assert slow is not None
    assert slow[0] == "both reached 92.6 Gb/s there, less than 171.0"
    assert check_latency({"rail 0": 2.0}) is None
    late = check_latency({"rail 0": 2.0, "rail 1": 20_000.0})
    assert late is not None
    assert late[0] == "a small write over rail 1 takes 20000 us, more than 1000"


def test_a_failure_is_one_sentence() -> None:
    error = StepFailedError("it did not arrive.", Advice("the cable is bad", "exchange it"))
    assert str(error) == "it did not arrive: the cable is bad; exchange it"
    result = StepResult("rail 0", "Rail 0", "failed", 1.0, "", error.seen, "the cable is bad", "exchange it")
    assert result.sentence == str(error)
    assert StepResult("rail 0", "Rail 0", "passed", 1.0).sentence == ""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("10.0.0.1, 192.168.1.7, 127.0.0.1, fe80::1, fd00::2, ::1", True),
        ("0000:01:00.0 at 12:30:45, version 1.2.3.4.5, mlx5_0", True),
        ("8.8.8.8", False),
        ("at 2a00:1450:4001:82b::200e now", False),
        ("::ffff:8.8.8.8", False),
        (SECRET, False),
    ],
)
def test_no_secret_and_no_public_address(text: str, kept: bool) -> None:
    result = redacted(f"<{text}>", SECRET)
    assert (result == f"<{text}>") == kept
    if not kept:
        assert text not in result
        assert "8.8.8.8" not in result


def test_the_report_file(tmp_path: Path) -> None:
    config = SparkConfig(address="10.0.0.1", secret_file=tmp_path / "where the secret lies")
    report = Report.begin(0, "one", config)
    report.steps.append(StepResult("pinning", "Memory", "passed", 0.5, figures={"region_bytes": 7}))
    report.reason = f"a sentence with {SECRET} and 8.8.4.4"
    report.write(tmp_path / "report.json", SECRET)
    text = (tmp_path / "report.json").read_text()
    content = json.loads(text)
    assert content["steps"][0]["figures"] == {"region_bytes": 7}
    assert content["settings"]["address"] == "10.0.0.1"
    assert content["reason"] == "a sentence with (secret) and (public address)"
    assert "where the secret lies" not in text


def test_a_secret_that_json_escapes(tmp_path: Path) -> None:
    secret = 'a "quoted" secret\\ of these tests'
    report = Report.begin(0, "one", SparkConfig(address="10.0.0.1"))
    report.reason = f"a sentence with {secret}"
    report.write(tmp_path / "report.json", secret)
    assert json.loads((tmp_path / "report.json").read_text())["reason"] == "a sentence with (secret)"


class LateFailure:
    """The part of a runtime that checked collectives use; it fails while they wait for a result, as a GPU's does."""

    device, rank, failed = "cpu", 0, False

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([torch.zeros_like(tensor)] * 2)

    def check(self) -> None:
        if self.failed:
            raise CollectiveError("the other machine stopped")


def test_a_failed_collective_is_not_taken_for_wrong_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of a GPU are looked at together, after a failure that has not been seen yet."""
    runtime: Any = LateFailure()
    look = torch.Tensor.__bool__

    def wait_and_look(tensor: torch.Tensor) -> bool:
        runtime.failed = True
        return bool(look(tensor))

    monkeypatch.setattr(torch.Tensor, "__bool__", wait_and_look)
    with pytest.raises(CollectiveError, match="the other machine stopped"):
        CheckedCollectives(runtime, seed=1).run()


class Abortable:
    """The part of a runtime that a peer uses."""

    closed = False

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.reason = ""
        self.delivered: list[bytes] = []

    def abort(self, reason: str) -> None:
        self.reason = reason
        self.aborted.set()

    def deliver(self, announcement: bytes) -> None:
        self.delivered.append(announcement)


@contextmanager
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Peer, Peer]]:
    monkeypatch.setenv("VLLMSPARK_SECRET", SECRET)
    (port,) = free_ports(1)
    config = SparkConfig(address=LOOPBACK, leader=LOOPBACK, port=port)
    with ThreadPoolExecutor() as threads:
        listening = threads.submit(await_connection, config, PATIENCE, "vllm-spark x")
        connecting = threads.submit(open_connection, config, PATIENCE, "vllm-spark x")
        one, other = Peer(listening.result()), Peer(connecting.result())
        try:
            yield one, other
        finally:
            one.close()
            other.close()


def test_messages_announcements_and_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = Abortable()
    with peers(monkeypatch) as (one, other), ThreadPoolExecutor() as threads:
        announces = [end.begin_runtime() for end in (one, other)]
        announces[1](b"of the one before")
        announces = [end.begin_runtime() for end in (one, other)]
        announces[1](b"early")
        said = [threads.submit(end.exchange, mine) for end, mine in ((one, b"1"), (other, b"2"))]
        assert [half.result(PATIENCE) for half in said] == [b"2", b"1"]
        one.watch(runtime)
        assert runtime.delivered == [b"early"]
        waiting = threads.submit(one.exchange, b"")
        other.fail("its cable is out")
        with pytest.raises(PeerFailedError, match="failed: its cable is out"):
            waiting.result(PATIENCE)
        assert runtime.aborted.wait(PATIENCE)
        assert "its cable is out" in runtime.reason


def test_a_peer_that_is_gone_aborts_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = Abortable()
    with peers(monkeypatch) as (one, other):
        one.watch(runtime)
        other.close()
        assert runtime.aborted.wait(PATIENCE)
        with pytest.raises(PeerLostError, match="closed the connection"):
            one.check()


def test_a_message_that_cannot_be_taken_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader's thread would end, and the other machine be blamed for it."""
    runtime: Any = Abortable()

    def fail(announcement: bytes) -> None:
        raise KeyError(announcement)

    runtime.deliver = fail
    with peers(monkeypatch) as (one, other), ThreadPoolExecutor() as threads:
        announces = [end.begin_runtime() for end in (one, other)]
        one.watch(runtime)
        waiting = threads.submit(one.exchange, b"")
        announces[1](b"bad")
        with pytest.raises(PeerLostError, match=r"could not be taken: KeyError: b'bad'; please report it"):
            waiting.result(PATIENCE)
        assert runtime.aborted.is_set()


def test_stopping_ends_a_wait_here_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = Abortable()
    with peers(monkeypatch) as (one, other), ThreadPoolExecutor() as threads:
        one.watch(runtime)
        waits = [threads.submit(one.exchange, b"")]
        one.stop("SIGINT")
        with pytest.raises(PeerLostError, match=r"SIGINT|closed"):
            waits[0].result(PATIENCE)
        assert runtime.aborted.is_set()
        with pytest.raises(PeerFailedError, match="it was stopped there by SIGINT"):
            _exchange_twice(other)


def _exchange_twice(peer: Peer) -> None:
    """The first message may have come before the failure."""
    for _ in range(2):
        peer.exchange(b"")
