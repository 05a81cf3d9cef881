"""`vllm-spark trace` of a real pair on two hosts, the second one with another clock."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.test_trace_timeline import nesting_errors
from vllm_spark.cli import EXIT_INTERRUPTED
from vllm_spark.errors import EXIT_LOST
from vllm_spark.processes.managed import clean_environment, program
from vllm_spark.recording.parts import FORWARD, HEAD, PREPARE, SAMPLE, SCHEDULE, SEND, WAIT_STEP

from .hosts import Hosts
from .servers import Server, spark_tp2

COMPLETIONS = "POST /v1/completions"
KEY = "sesame"
SECONDS = 120.0
STEPS = 20
AHEAD = 1234
"""Seconds that the second host's clock is ahead: CLOCK_MONOTONIC of a time namespace."""


def has_time_namespaces() -> bool:
    try:
        return subprocess.run(["unshare", "--time", "--fork", "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False


@pytest.fixture(scope="module")
def permitting(hosts: Hosts, tiny_moe: Path) -> Iterator[Server]:
    """A pair that permits traces and requires a key; its messages go through the proxy."""
    ahead = AHEAD if has_time_namespaces() else 0
    arguments = ["--api-key", KEY, "--spark-trace", "on", "--spark-loopback-mode", "proxied"]
    with hosts[1].clock_ahead(ahead), spark_tp2(hosts, tiny_moe, arguments) as server:
        yield server


def command(server: Server, *options: str) -> list[str]:
    return [program("vllm-spark"), "trace", "--url", server.url, *options]


def environment(key: str | None = KEY) -> dict[str, str]:
    return clean_environment() | ({} if key is None else {"VLLM_API_KEY": key})


def trace(host: Any, server: Server, folder: Path, *options: str, key: str | None = KEY) -> Any:
    words = ["--out", str(folder / "trace.json"), *options]
    return host.run(command(server, *words), environment(key), SECONDS)


def test_a_trace_of_both_ranks(permitting: Server, hosts: Hosts, tmp_path: Path) -> None:
    """Asked from the second host, as the user of either machine may."""
    done = trace(
        hosts[1], permitting, tmp_path, "--steps", str(STEPS), "--batch", "2", "--image", str(tmp_path / "step.png")
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "trace.json").read_text()
    content = json.loads(text)
    assert nesting_errors(content) == []
    events, about = content["traceEvents"], content["otherData"]
    for rank, role in enumerate(("leader", "follower")):
        mine = [event for event in events if event["pid"] == rank]
        (name,) = [event["args"]["name"] for event in mine if event["name"] == "process_name"]
        assert name.startswith(f"rank {rank} ({role}) on ")
        names = {event["name"] for event in mine if event["ph"] == "X"}
        assert names >= {PREPARE, FORWARD, HEAD, SAMPLE, *((SCHEDULE, SEND) if rank == 0 else (WAIT_STEP,))}
        collectives = [event for event in mine if event["name"].startswith("all_reduce of ")]
        posts = [event for event in mine if event["ph"] == "i"]
        compared = [event for event in mine if event["name"] == "decode step" and event["args"]["compared"]]
        assert len(compared) == STEPS
        assert len(collectives) >= STEPS
        assert {event["args"]["sequence"] for event in collectives} <= {event["args"]["sequence"] for event in posts}
    for lane in about["parts_us"]:
        assert lane["agrees"], lane
        assert abs(lane["sum_of_parts"] - 1) <= 0.03
        assert lane["steps"] == STEPS
    uncertainty = about["clock_uncertainty_ns"]
    if has_time_namespaces():
        assert abs(about["follower_clock_ahead_ns"] - AHEAD * 10**9) <= uncertainty
    assert 0 < uncertainty < 5_000_000
    # No message arrives before it was sent, as far as the clocks can tell.
    starts, ends = ({event["id"]: event["ts"] for event in events if event["ph"] == kind} for kind in ("s", "f"))
    assert len(starts) >= STEPS
    assert all(starts[number] <= ends[number] + uncertainty / 1e3 for number in starts)
    # The client's clock has nothing to do with the engine's: the same steps, measured from outside.
    steps = [event["dur"] for event in events if event["name"] == "decode step" and event["pid"] == 0]
    client = sorted(about["token_interval_at_client_us"])[len(about["token_interval_at_client_us"]) // 2]
    assert client == pytest.approx(sorted(steps)[len(steps) // 2], rel=0.5)


def test_a_trace_has_nothing_of_other_users_prompts(permitting: Server, hosts: Hosts, tmp_path: Path) -> None:
    client = permitting.client.with_options(api_key=KEY)
    spoken = "a secret of somebody else"
    model = client.models.list().data[0].id
    stream = client.completions.create(
        model=model, prompt=spoken, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    done = trace(hosts[0], permitting, tmp_path, "--steps", "5")
    stream.close()
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "trace.json").read_text()
    assert "secret" not in text
    assert "cmpl-" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_ended(permitting: Server, hosts: Hosts, tmp_path: Path, number: signal.Signals) -> None:
    """The next one records as the first; after SIGKILL once the recording has ended by itself."""
    seconds = "60" if number is signal.SIGINT else "15"
    load = ("--batch", "8", "--steps", "800", "--seconds", seconds)
    words = command(permitting, *load, "--out", str(tmp_path / "ended.json"))
    before = permitting.leader.output().count(COMPLETIONS)
    process = hosts[0].popen(words, environment(), "vllm-spark trace", cold=True)
    permitting.leader.wait_until(
        lambda: permitting.leader.output().count(COMPLETIONS) > before, SECONDS, "get the requests of the trace"
    )
    psutil.Process(process.pid).send_signal(number)
    code = process.wait(SECONDS)
    assert code == (EXIT_INTERRUPTED if number is signal.SIGINT else -number)
    assert "Traceback" not in process.output()
    assert not (tmp_path / "ended.json").exists()
    refused = f"{permitting.url} records nothing: another trace is being recorded; wait for its end, and try again"
    deadline = time.monotonic() + SECONDS
    while (done := trace(hosts[0], permitting, tmp_path, "--steps", "5")).returncode != 0:
        assert number is signal.SIGKILL, done.stderr
        assert refused in done.stderr
        assert time.monotonic() < deadline
    client = permitting.client.with_options(api_key=KEY)
    assert client.completions.create(model=client.models.list().data[0].id, prompt="a", max_tokens=4).choices


@pytest.mark.parametrize("key", [None, "other"])
def test_another_key(permitting: Server, hosts: Hosts, tmp_path: Path, key: str | None) -> None:
    done = trace(hosts[0], permitting, tmp_path, key=key)
    assert done.returncode == EXIT_LOST
    assert "requires another API key" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_the_model_takes(permitting: Server, hosts: Hosts, tmp_path: Path) -> None:
    done = trace(hosts[0], permitting, tmp_path, "--prompt-tokens", "5000")
    assert done.returncode == EXIT_LOST
    assert re.search(r"does not complete the prompts of the trace: HTTP status 400: .*1024", done.stderr)
    assert trace(hosts[0], permitting, tmp_path, "--steps", "3").returncode == 0
