"""The start table of a real pair, and `vllm-spark status`: on terminals of two widths, without one, and as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.terminal import TerminalProgram, shown_on_terminal
from vllm_spark import __version__
from vllm_spark.errors import EXIT_LOST
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import clean_environment, program

from .counters import settled
from .hosts import Hosts
from .servers import COMMON_ARGUMENTS, START_SECONDS, Server, spark_tp2

KEY = "sesame"
STATUS_SECONDS = 60.0
WIDTHS = pytest.mark.parametrize("columns", [80, 160])
SHOWN_AT_START = (
    *("machine", "device", "versions", "memory (GiB)", "kernel tables", "transport", "protocol", "ports"),
    "is it used",
)
SHOWN_LATER = (
    *("available now", "GPU", "processor", "steps", "collectives", "waited", "rails now", "fall-backs", "serves since"),
)


@pytest.fixture(scope="module")
def guarded(hosts: Hosts, tiny_moe: Path) -> Iterator[Server]:
    """A pair whose server requires an API key."""
    with spark_tp2(hosts, tiny_moe, ["--api-key", KEY, "--served-model-name", "tiny"]) as server:
        yield server


def status(server: Server, *options: str) -> list[str]:
    """The command."""
    return [program("vllm-spark"), "status", "--url", server.url, *options]


def environment(key: str | None = KEY) -> dict[str, str]:
    return clean_environment() | ({} if key is None else {"VLLM_API_KEY": key})


def labels(lines: list[str]) -> set[str]:
    """Of the rows of a table."""
    return {label for line in lines for label in (*SHOWN_AT_START, *SHOWN_LATER) if line.startswith(label)}


def test_the_start_table_is_in_the_log(guarded: Server) -> None:
    log = guarded.leader.output()
    start = re.search(r"tiny is served by \S+ \(leader\) and \S+ \(follower\)\.\n(?:.*\n)*?.*is it used: (.*)", log)
    assert start is not None
    for label in SHOWN_AT_START:
        assert f" {label}: " in start[0]
    assert f"versions: vllm_spark {__version__}, vLLM 0." in start[0]
    assert "transport: over loopback, direct." in start[0]
    assert "protocol: LL up to 8,192 bytes, Simple above." in start[0]
    assert re.search(rf"ports: follower at \S+:\d+, clients at {re.escape(guarded.url)}\.", start[0])
    assert re.search(
        r"memory \(GiB\): weights 0\.0\d, KV cache 1\.0, region 0\.0\d, desktop 0\.0 of \d+\.\d\.", start[0]
    )
    assert log.index(start[0]) < log.index("Application startup complete")


def test_the_numbers_are_those_of_the_pair(guarded: Server, hosts: Hosts, tiny_moe: Path) -> None:
    guarded.client.with_options(api_key=KEY).completions.create(model="tiny", prompt="a", max_tokens=8)
    settled(guarded)
    done = hosts[1].run(status(guarded, "--json"), environment(), STATUS_SECONDS)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    leader, follower = report["facts"]["ranks"]
    weights = (tiny_moe / "model.safetensors").stat().st_size
    assert guarded.follower is not None
    assert leader["process"] in {child.pid for child in guarded.leader.descendants()}
    assert follower["process"] in {child.pid for child in guarded.follower.descendants()}
    for rank in (leader, follower):
        assert rank["kv_cache"] == pytest.approx(1 << 30, rel=0.01)
        # Half of them, with twice the bytes in float32, but for the output head, which vLLM's CPU build repacks.
        assert rank["weights"] == pytest.approx(weights, rel=0.15)
        assert rank["memory"] == psutil.virtual_memory().total
    exported = settled(guarded)
    for counters in report["counters"]:
        rank = str(counters["rank"])
        assert 8 <= counters["steps"] <= exported["vllm_spark_steps_total"][rank]
        assert 0 < counters["all_reduces"] <= exported["vllm_spark_all_reduces_total"][rank]
    for readings in report["readings"]:
        assert 0 < readings["memory_available"] < psutil.virtual_memory().total


@WIDTHS
def test_the_status_on_a_terminal(guarded: Server, columns: int) -> None:
    guarded.client.with_options(api_key=KEY).completions.create(model="tiny", prompt="a", max_tokens=8)
    shown = shown_on_terminal(status(guarded), columns, environment(), STATUS_SECONDS)
    print("\n".join(shown))
    assert max(map(len, shown)) <= columns
    assert labels(shown) == {*SHOWN_AT_START, *SHOWN_LATER}
    assert re.search(r"is it used +yes: [\d,]+ collectives of each rank", "\n".join(shown))


def test_the_status_without_a_terminal_is_lines(guarded: Server, hosts: Hosts) -> None:
    done = hosts[0].run(status(guarded, "--api-key", KEY), environment(None), STATUS_SECONDS)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert labels(done.stdout.splitlines()) == {*SHOWN_AT_START, *SHOWN_LATER}
    assert "\x1b" not in done.stdout


def test_a_pair_that_does_not_permit_traces(guarded: Server, hosts: Hosts, tmp_path: Path) -> None:
    """Here and not beside the other traces: this pair was started without the setting."""
    words = [program("vllm-spark"), "trace", "--url", guarded.url, "--out", str(tmp_path / "trace.json")]
    done = hosts[0].run(words, environment(), STATUS_SECONDS)
    assert (done.returncode, done.stdout) == (EXIT_LOST, "")
    assert done.stderr == (
        f"vllm-spark: {guarded.url} records nothing: this server does not permit traces; start vllm serve with "
        "--spark-trace on.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_another_key_is_told(guarded: Server, hosts: Hosts) -> None:
    for key in (None, "other"):
        done = hosts[0].run(status(guarded), environment(key), STATUS_SECONDS)
        assert (done.returncode, done.stdout) == (EXIT_LOST, "")
        assert done.stderr == (
            f"vllm-spark: {guarded.url} requires another API key; give it with --api-key or in the variable "
            "VLLM_API_KEY.\n"
        )


@pytest.mark.parametrize("columns", [80, pytest.param(160, marks=pytest.mark.thorough)])
def test_the_start_table_on_a_terminal(hosts: Hosts, tiny_moe: Path, columns: int) -> None:
    first, second = hosts
    port, secret = str(first.free_port()), {"VLLMSPARK_SECRET": "the secret of both machines"}
    variables = clean_environment() | CPU_ENVIRONMENT | secret
    join = [program("vllm-spark"), "join", "--leader", first.address, "--port", port]
    serve = [
        *(program("vllm"), "serve", str(tiny_moe), *COMMON_ARGUMENTS, "--served-model-name", "tiny"),
        *("--host", first.address, "--port", str(first.free_port())),
        *("--spark", "--spark-address", first.address, "--spark-port", port, "--spark-transport", "loopback"),
    ]
    follower = second.popen(join, CPU_ENVIRONMENT | secret, "vllm-spark join")
    try:
        with TerminalProgram(first.command(serve), columns, dict(os.environ) | variables) as leader:
            leader.wait_for("Application startup complete", START_SECONDS)
            shown = leader.lines
    finally:
        follower.terminate()
    (head,) = (number for number, line in enumerate(shown) if line.startswith("tiny is served by"))
    end = next(number for number in range(head, len(shown)) if shown[number].startswith("is it used"))
    table = shown[head : end + 1]
    print("\n".join(table))
    assert labels(table) == set(SHOWN_AT_START)
    assert max(map(len, table)) <= columns
