"""`vllm-spark join` waits on after whatever heals, and ends for what does not. Real processes and connections."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import Kind
from vllm_spark.executor.handshake.messages import Offer
from vllm_spark.executor.handshake.server import Listener

from .test_channel import LIMIT, SECRET, port_of, wait_for
from .test_leader_search import model_at, offer_of

pytest.importorskip("vllm", reason="vLLM is not installed")

JOIN = "import sys; from vllm_spark.cli import main; sys.exit(main())"
START_SECONDS = 120.0
"""Bound for a process to import vLLM, and to come to its leader."""


class Join:
    """A running `vllm-spark join` for a leader of this process."""

    def __init__(self, port: int, log: Path, secret: bytes = SECRET, *more: str) -> None:
        self.log = log
        argv = [sys.executable, "-c", JOIN, "join", "--leader", "127.0.0.1", "--port", str(port), *more]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                argv, env={**os.environ, "VLLMSPARK_SECRET": secret.decode()}, stdout=output, stderr=output
            )

    def wait_for(self, text: str) -> None:
        """Waits until it has logged that."""

        def logged() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return text in self.log.read_text()

        wait_for(logged, f"logged: {text}", START_SECONDS)


@pytest.fixture
def joins() -> Iterator[list[Join]]:
    made: list[Join] = []
    yield made
    for join in made:
        join.process.terminate()
        join.process.wait(20)


def listen(port: int = 0) -> Listener:
    return Listener("127.0.0.1", port, tls_context(SECRET, "leader"), LIMIT)


def lead(listener: Listener, offer: Offer) -> threading.Thread:
    """Waits for a follower, and fails once it has come."""

    def run() -> None:
        follower = listener.wait_for_follower(offer, START_SECONDS)
        follower.rpc.send(Kind.HEARTBEAT)  # not what is due: the follower's session ends with an error
        time.sleep(0.5)
        listener.close()
        follower.control.close()
        follower.rpc.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_it_waits_on_after_a_refusal_and_after_a_failure(tmp_path: Path, joins: list[Join]) -> None:
    model = model_at(tmp_path / "model")
    offer = offer_of(model)
    model.rename(tmp_path / "elsewhere")
    leader = listen()
    port = port_of(leader)
    leading = lead(leader, offer)
    join = Join(port, tmp_path / "join.log")
    joins.append(join)
    join.wait_for("Retrying the leader at")
    (tmp_path / "elsewhere").rename(model)
    join.wait_for("accepts this follower now")
    leading.join(START_SECONDS)
    second = listen(port)
    leading = lead(second, offer)
    leading.join(START_SECONDS)
    assert not leading.is_alive()
    assert join.process.poll() is None
    assert join.log.read_text().count("Retrying the leader at") == 1


@pytest.mark.parametrize(
    ("secret", "more", "code", "sentence"),
    [
        (b"another secret, as long", (), 2, "has another secret"),
        (SECRET, ("--once",), 3, "there is no model in"),
    ],
    ids=["another secret", "once"],
)
def test_it_ends(
    tmp_path: Path, joins: list[Join], secret: bytes, more: tuple[str, ...], code: int, sentence: str
) -> None:
    model = model_at(tmp_path / "model")
    offer = offer_of(model)
    model.rename(tmp_path / "elsewhere")
    leader = listen()
    lead(leader, offer)
    join = Join(port_of(leader), tmp_path / "join.log", secret, *more)
    joins.append(join)
    assert join.process.wait(START_SECONDS) == code
    assert sentence in join.log.read_text()
    leader.close()
