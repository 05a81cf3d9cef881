"""Whoever does not fit or does not belong is told so in a sentence, and the server does not notice."""

from __future__ import annotations

import shutil
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

import vllm_spark
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from . import prompts
from .hosts import Hosts
from .process import Process, assert_all_gone
from .servers import Server, spark_leader

SECRET = {"VLLMSPARK_SECRET": "the secret of both machines"}
MAIN = "import sys; from vllm_spark.cli import main; sys.exit(main())"
ANSWER_SECONDS = 90.0
"""Bound for a follower to start, to be looked at, and to end: it imports vLLM and reads the model's files."""


def join(
    hosts: Hosts, port: str, environment: dict[str, str] | None = None, first: str = "", python: str = ""
) -> Process:
    """`vllm-spark join --once` on the second host; `first` is a shell command that prepares the host for it alone."""
    command = [sys.executable, "-c", python] if python else [program("vllm-spark")]
    argv = [*command, "join", "--leader", hosts[0].address, "--port", port, "--once"]
    if first:
        argv = ["/bin/sh", "-c", f'{first} && exec "$@"', "sh", *argv]
    return hosts[1].popen(argv, CPU_ENVIRONMENT | (SECRET if environment is None else environment), "vllm-spark join")


def assert_told(process: Process, exit_code: int, *parts: str) -> None:
    """Checks exit code and sentence of a follower that was turned away."""
    assert process.wait(ANSWER_SECONDS) == exit_code, process.tail()
    output = process.output()
    assert "Traceback" not in output, output
    for part in parts:
        assert part in output, output
    assert_all_gone(process)


class Turned(NamedTuple):
    """A follower that was turned away, and what it must have been told."""

    process: Process
    sentences: tuple[str, ...]


class Serving:
    """A pair at work, the port at which its leader listens, and whom the leader waited past before."""

    def __init__(self, server: Server, port: str, turned: list[Turned]) -> None:
        self.server, self.port, self.turned = server, port, turned


@pytest.fixture(scope="module")
def serving(hosts: Hosts, tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Before the follower that fits there are some that do not."""
    port = str(hosts[0].free_port())
    arguments = ["--spark-model-sync", "off"]  # else a follower copies what it lacks
    with spark_leader(hosts, tiny_moe, port, arguments, SECRET, wait=False) as server:
        server.leader.wait_for_line("Waiting for the follower", ANSWER_SECONDS)
        turned = list(unfit_followers(hosts, port, tiny_moe, tmp_path_factory.mktemp("unfit")))
        argv = [program("vllm-spark"), "join", "--leader", hosts[0].address, "--port", port]
        follower = hosts[1].popen(argv, CPU_ENVIRONMENT | SECRET, "vllm-spark join")
        server.wait_until_healthy()
        yield Serving(server, port, turned)
        follower.terminate()


def unfit_followers(hosts: Hosts, port: str, model: Path, folder: Path) -> Iterator[Turned]:
    """Another version, other weights, another model, none: each comes alone, and is waited for."""
    older = join(hosts, port, {**SECRET, "PYTHONPATH": str(another_version(folder))}, python=MAIN)
    older.wait(ANSWER_SECONDS)
    yield Turned(older, (f"vllm_spark is {vllm_spark.__version__} on the leader and 0.0.9 on the follower",))
    if hosts[0].namespace is None:  # with it comes a mount namespace, in which the follower sees other files
        return
    for name, sentence in (
        ("weights", "the weight file model.safetensors has other content on "),
        ("config", "the configuration file config.json has other content on "),
        ("none", "there is no model"),
    ):
        other = other_model(model, folder, name)
        hide = f"mount --bind {other} {model if name != 'none' else model.parent}"
        # Without models that were copied to this user's home by other tests.
        process = join(hosts, port, {**SECRET, "XDG_DATA_HOME": str(folder / "data")}, first=hide)
        process.wait(ANSWER_SECONDS)
        yield Turned(process, (sentence, str(model)))


def assert_untouched(serving: Serving, reference_tokens: list[list[int]]) -> None:
    assert prompts.greedy_tokens(serving.server.client, prompts.PROMPTS[:2]) == reference_tokens[:2]
    assert set(serving.server.metrics()["vllm_spark_fallbacks_total"].values()) == {0}


def test_strangers_at_a_serving_pair(hosts: Hosts, serving: Serving, reference_tokens: list[list[int]]) -> None:
    assert_told(join(hosts, serving.port, {"VLLMSPARK_SECRET": "another one, also long"}), 2, "has another secret")
    nothing = {"XDG_CONFIG_HOME": "/nowhere"}
    assert_told(join(hosts, serving.port, nothing), 2, "VLLMSPARK_SECRET", "--secret-file FILE")
    assert_told(join(hosts, serving.port), 3, "has a follower already")
    assert_untouched(serving, reference_tokens)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n",
        bytes(range(256)) * 400,
        b"\x16\x03\x01" + struct.pack(">H", 0xFFFF) + b"\x01" * 0xFFFF,  # a TLS record of impossible size
    ],
    ids=["port scanner", "browser", "noise", "oversized"],
)
def test_garbage_at_a_serving_pair(
    hosts: Hosts, serving: Serving, reference_tokens: list[list[int]], sent: bytes
) -> None:
    for _ in range(20):
        stranger = socket.create_connection((hosts[0].address, int(serving.port)), timeout=10)
        with stranger, suppress(ConnectionError):  # it may be shown the door before it is through
            stranger.sendall(sent)
    assert_untouched(serving, reference_tokens)


def test_followers_that_do_not_fit_are_waited_past(
    hosts: Hosts, serving: Serving, reference_tokens: list[list[int]]
) -> None:
    """Each ends with its reason, and the next one is taken."""
    assert len(serving.turned) == (1 if hosts[0].namespace is None else 4)
    for turned in serving.turned:
        assert_told(turned.process, 3, *turned.sentences)
    assert_untouched(serving, reference_tokens)


def another_version(folder: Path) -> Path:
    """A folder from which Python imports this package as an installed one, but for its version."""
    package = Path(vllm_spark.__file__).parent
    copy = shutil.copytree(package, folder / "older" / "vllm_spark", ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "__init__.py").read_text()
    (copy / "__init__.py").write_text(source.replace(vllm_spark.__version__, "0.0.9"))
    return copy.parent


def other_model(model: Path, folder: Path, name: str) -> Path:
    """A folder that differs from `model` in its weights or its configuration, or an empty one."""
    other = folder / name
    if name == "none":
        other.mkdir()
        return other
    shutil.copytree(model, other)
    if name == "config":
        config = (other / "config.json").read_text()
        (other / "config.json").write_text(config.replace("{", '{"other": 1,', 1))
    else:
        weights = next(other.glob("*.safetensors"))
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    return other
