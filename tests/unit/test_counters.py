"""The status on which the engine shows its counters to another process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_spark.backend.metrics import SparkCollector
from vllm_spark.backend.status import STATUS_VARIABLE, EngineStatus, RankCounters, record_stop_request
from vllm_spark.bench.ranks import Rank, run_ranks
from vllm_spark.collective import Runtime, RuntimeOptions, install
from vllm_spark.errors import PeerLostError
from vllm_spark.executor.counters import local_counters

ENGINE = """
from vllm_spark.backend.status import EngineStatus, RankCounters
from vllm_spark.errors import PeerLostError
status = EngineStatus.from_environment()
status.write(RankCounters(0, steps=5, digest="0123456789abcdef", all_reduces=45))
status.write(RankCounters(1, steps=5, digest="0123456789abcdef", all_reduces=45, rails_up=2, reposts=3,
                          rail_proof_failures=4, rails_held_down=1, rail_posts=(10, 11), rail_bytes=(100, 110),
                          rail_doorbells=(5, 6)))
status.fail(PeerLostError("the follower left"))
"""


@pytest.fixture
def status(monkeypatch: pytest.MonkeyPatch) -> EngineStatus:
    monkeypatch.setenv(STATUS_VARIABLE, "")
    return EngineStatus.create()


def test_another_process_writes_what_this_one_reads(status: EngineStatus) -> None:
    assert status.read() == []
    assert status.failure() is None
    subprocess.run([sys.executable, "-c", ENGINE], check=True, timeout=60)
    assert [(record.rank, record.steps, record.all_reduces) for record in status.read()] == [(0, 5, 45), (1, 5, 45)]
    failure = status.failure()
    assert str(failure) == "the follower left"
    assert failure is not None
    assert failure.exit_code == PeerLostError.exit_code
    collected = [sample for family in SparkCollector(status).collect() for sample in family.samples]
    samples = {(sample.name, sample.labels.get("rank")): sample.value for sample in collected}
    by_rail = {
        tuple(sample.labels.values()): sample.value for sample in collected if sample.name.endswith("posts_total")
    }
    assert (by_rail["1", "0"], by_rail["1", "1"]) == (10, 11)
    assert samples["vllm_spark_rail_bytes_total", "1"] == 110, "the last rail's"
    assert samples["vllm_spark_rail_doorbells_total", "1"] == 6
    assert samples["vllm_spark_all_reduces_total", "1"] == 45
    assert samples["vllm_spark_token_digest", "0"] == 0x0123456789AB
    assert (samples["vllm_spark_rails_up", "0"], samples["vllm_spark_rails_up", "1"]) == (0, 2)
    assert samples["vllm_spark_reposts_total", "1"] == 3
    assert samples["vllm_spark_rail_proof_failures_total", "1"] == 4
    assert samples["vllm_spark_rails_held_down", "1"] == 1
    assert {name.removeprefix("vllm_spark_").removesuffix("_total") for name, _ in samples} == {
        "token_digest" if field.name == "digest" else field.name
        for field in dataclasses.fields(RankCounters)
        if field.name != "rank"
    }


def work_and_report(rank: Rank) -> None:
    import torch

    options = RuntimeOptions(timeout_s=30.0, loopback_mode="proxied", slot_bytes=1 << 20)
    with Runtime.connect(rank.index, 2, rank.exchange, options) as runtime:
        install(runtime)
        runtime.all_reduce(torch.ones(8))
        runtime.all_gather(torch.ones(1 << 20))  # 4 MiB
        rank.report(local_counters(rank.index, (3, b"\xab")))
        rank.exchange(b"")


def test_a_rank_tells_what_its_runtime_did() -> None:
    told: list[RankCounters] = []
    run_ranks(work_and_report, on_report=told.append)
    assert sorted(counters.rank for counters in told) == [0, 1]
    for counters in told:
        assert (counters.steps, counters.digest, counters.fallbacks) == (3, "ab", 0)
        assert (counters.all_reduces, counters.all_reduce_bytes) == (1, 32)
        assert (counters.all_gathers, counters.all_gather_bytes) == (1, 4 << 20)
        assert (counters.packet_messages, counters.payload_messages, counters.chunked_operations) == (1, 4, 1)
        assert counters.proxy_posts > 0
        assert (counters.rails_up, counters.rail_failures, counters.rail_recoveries, counters.reposts) == (0, 0, 0, 0)


def test_a_long_reason_is_shortened(status: EngineStatus) -> None:
    status.fail(PeerLostError("weights that are missing: " + "\x01" * 10_000))
    failure = status.failure()
    assert failure is not None
    assert str(failure).startswith("weights that are missing: ")
    assert str(failure).endswith("[...]")
    assert failure.exit_code == PeerLostError.exit_code


def test_a_reason_is_taken_back(status: EngineStatus) -> None:
    """A pair that works after one that broke has no reason to fail."""
    status.fail(PeerLostError("the follower left"))
    EngineStatus.from_environment().clear()
    assert status.failure() is None
    status.fail(PeerLostError("it left again"))
    assert str(status.failure()) == "it left again"
    EngineStatus(None).clear()


def started_engine() -> subprocess.Popen[bytes]:
    """A process that has recorded its start as the engine, and runs until it is ended."""
    say = (
        "from vllm_spark.backend.status import EngineStatus; status = EngineStatus.from_environment(); "
        "status.mark_started()"
    )
    engine = subprocess.Popen([sys.executable, "-c", f"{say}; print(flush=True); input()"], stdin=-1, stdout=-1)
    assert engine.stdout is not None
    engine.stdout.readline()
    return engine


def test_an_engine_that_was_killed_is_known_by_its_silence(status: EngineStatus) -> None:
    engine = started_engine()
    assert status.death() is None, "it still runs"
    engine.kill()
    os.waitid(os.P_PID, engine.pid, os.WEXITED | os.WNOWAIT)
    for ended in ("with its exit code left", "wholly"):
        death = status.death()
        assert f"the engine (process {engine.pid}) was killed or crashed" in str(death), ended
        engine.communicate(timeout=60)
    status.fail(PeerLostError("the follower left"))
    assert str(status.death()) == "the follower left"
    status.clear()
    status.mark_ended(clean=True)
    assert status.death() is None


def test_an_engine_that_is_told_to_end_does_not_fail_afterwards(status: EngineStatus) -> None:
    """vLLM kills an engine that takes too long to end, and a session that breaks meanwhile is no failure either."""
    engine = started_engine()
    assert not status.ended_on_request()
    record_stop_request()
    assert status.ended_on_request()
    status.fail(PeerLostError("the follower left"))
    engine.kill()
    engine.communicate(timeout=60)
    assert status.death() is None
    status.clear()
    assert not status.stop_requested(), "it was another engine"


def test_a_request_to_end_after_a_failure_changes_nothing(status: EngineStatus) -> None:
    """vLLM also ends an engine that has failed, or what is left of one that was killed."""
    status.mark_started()
    status.fail(PeerLostError("the follower left"))
    record_stop_request()
    assert str(status.death()) == "the follower left"
    status.clear()
    start = "from vllm_spark.backend.status import EngineStatus; EngineStatus.from_environment().mark_started()"
    dead = subprocess.Popen([sys.executable, "-c", start])
    dead.wait(60)
    record_stop_request()
    assert f"the engine (process {dead.pid}) was killed or crashed" in str(status.death())
    status.mark_ended(clean=False)
    record_stop_request()
    assert not status.ended_on_request()


def test_a_torn_record_is_not_believed(status: EngineStatus) -> None:
    status.write(RankCounters(0, steps=7))
    assert status._map is not None
    status._map[12] ^= 1
    assert status.read() == []


def test_without_a_board_everything_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STATUS_VARIABLE, raising=False)
    lonely = EngineStatus.from_environment()
    lonely.write(RankCounters(0))
    assert lonely.read() == []
    monkeypatch.setenv(STATUS_VARIABLE, f"/proc/{os.getpid()}/fd/9999 7")
    assert EngineStatus.from_environment().read() == []


def test_another_file_of_that_number_is_left_alone(
    status: EngineStatus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that created the status has ended and its PID is reused: with a file there, or another status."""
    path, _, inode = os.environ[STATUS_VARIABLE].partition(" ")
    theirs = tmp_path / "theirs"
    theirs.write_bytes(bytes(1 << 16))
    with theirs.open("r+b") as file:
        monkeypatch.setenv(STATUS_VARIABLE, f"/proc/{os.getpid()}/fd/{file.fileno()} {inode}".strip())
        EngineStatus.from_environment().fail(PeerLostError("the follower left"))
    assert theirs.read_bytes() == bytes(1 << 16)
    for announced in (f"{path} 1", path):
        monkeypatch.setenv(STATUS_VARIABLE, announced)
        EngineStatus.from_environment().fail(PeerLostError("the follower left"))
    assert status.failure() is None
