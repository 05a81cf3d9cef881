"""A follower outlives what its leaders refuse, and says each reason once. Real sockets, real TLS."""

from __future__ import annotations

import dataclasses
import logging
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import ConfigurationError, RefusedError, VersionsError
from vllm_spark.executor.channel.certificates import PROTOCOL, tls_context
from vllm_spark.executor.channel.framing import ChannelError, ConnectionClosedError, Kind
from vllm_spark.executor.channel.secret import secret_source
from vllm_spark.executor.handshake import leader_search
from vllm_spark.executor.handshake.client import Connector
from vllm_spark.executor.handshake.leader_search import Found, LeaderSearch
from vllm_spark.executor.handshake.messages import CONTROL, GROUPS, RPC, Offer
from vllm_spark.executor.handshake.server import Follower, Listener
from vllm_spark.executor.model_files.comparison import ModelIdentity
from vllm_spark.executor.model_files.loaded import LoadedFiles

from .other_programs import foreign_context, program_at
from .test_channel import LIMIT, OTHER, SECRET, caller, listener, wait_for

__all__ = ["listener"]

REFUSED_BY_FOLLOWER = "there is no model in "


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm_spark")
    monkeypatch.setattr(leader_search, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(leader_search, "_LONGEST_PAUSE", 0.2)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


def search(listener: Listener, secret: bytes = SECRET, *, once: bool = False) -> LeaderSearch:
    def connect() -> Connector:
        return caller(listener, secret)

    return LeaderSearch(SparkConfig(), connect, lambda *given: None, lambda environment: None, once=once)


def model_at(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def offer_of(folder: Path) -> Offer:
    files = LoadedFiles("model", str(folder), str(folder), "model", ModelIdentity.of(folder))
    return Offer(str(folder), [files], 5.0)


def follow(looking: LeaderSearch) -> Found:
    """What a follower does until the leader has all its connections."""
    found = looking.find()
    for connection in (RPC, GROUPS):
        assert found.connector.connect(connection) is not None
    return found


def accepted(listener: Listener, offer: Offer, pool: ThreadPoolExecutor) -> Future[Follower]:
    return pool.submit(listener.wait_for_follower, offer, 30.0)


def messages(caplog: pytest.LogCaptureFixture, pattern: str) -> list[str]:
    return [message for message in caplog.messages if re.search(pattern, message)]


def test_a_missing_model_is_copied_while_both_wait(
    listener: Listener, tmp_path: Path, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Each side says once what is wrong, and neither has to be started again."""
    model = model_at(tmp_path / "model")
    offer = offer_of(model)
    model.rename(tmp_path / "elsewhere")
    leader = accepted(listener, offer, pool)
    follower = pool.submit(follow, search(listener))
    tries = listener._refusals
    wait_for(lambda: tries, "the leader is told")
    wait_for(lambda: messages(caplog, "Retrying the leader at"), "the follower logs it")
    former, listener._last_problem = listener._last_problem, ""
    wait_for(lambda: listener._last_problem, "the follower asks again")
    assert listener._last_problem == former
    (tmp_path / "elsewhere").rename(model)
    assert leader.result(30).name.startswith("the follower on")
    assert follower.result(30).own == {("model", str(model), None): model}
    assert len(messages(caplog, f"does not fit: {REFUSED_BY_FOLLOWER}.*Still waiting")) == 1
    assert len(messages(caplog, "There is no model in .* Retrying the leader at")) == 1
    assert len(messages(caplog, "accepts this follower now")) == 1


def test_another_reason_is_said(
    listener: Listener, tmp_path: Path, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_at(tmp_path / "model")
    offer = offer_of(model)
    model_at(model, b"another")
    leader = accepted(listener, offer, pool)
    follower = pool.submit(follow, search(listener))
    wait_for(lambda: messages(caplog, "does not fit: the weight file model.safetensors has"), "the first reason")
    (model / "model.safetensors").unlink()
    wait_for(lambda: messages(caplog, "does not fit: the weight file model.safetensors is missing"), "the second one")
    model_at(model)
    leader.result(30)
    follower.result(30)
    assert len(messages(caplog, "Still waiting")) == 2


def test_the_next_follower_comes_when_the_place_is_free(
    listener: Listener, tmp_path: Path, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    offer = offer_of(model_at(tmp_path / "model"))
    leader = accepted(listener, offer, pool)
    follow(search(listener))
    leader.result(30)
    second = pool.submit(follow, search(listener))
    wait_for(lambda: messages(caplog, "has a follower already.*Retrying the leader at"), "it is refused")
    listener._last_problem = ""
    wait_for(lambda: listener._last_problem, "it asks again")
    leader = accepted(listener, offer, pool)
    listener._release()
    second.result(30)
    leader.result(30)
    assert len(messages(caplog, "Refused a follower on")) == 1


def test_once_ends_at_the_first_refusal(listener: Listener, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    model = model_at(tmp_path / "model")
    offer = offer_of(model)
    model.rename(tmp_path / "elsewhere")
    leader = accepted(listener, offer, pool)
    with pytest.raises(RefusedError, match=REFUSED_BY_FOLLOWER) as caught:
        search(listener, once=True).find()
    assert caught.value.exit_code == 3
    wait_for(lambda: listener._refusals, "the leader is told")
    (tmp_path / "elsewhere").rename(model)
    follow(search(listener))
    leader.result(30)


def test_what_no_waiting_heals(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="has another secret"):
        search(listener, OTHER).find()
    other = search(listener)
    speaker = caller(listener)
    speaker._versions = dataclasses.replace(speaker._versions, vllm="0.0.1")
    other._make_connector = lambda: speaker
    with pytest.raises(VersionsError, match=r"vllm is .* on the leader and 0\.0\.1 on the follower"):
        other.find()


def test_the_connection_to_a_leader_that_sends_something_else_is_closed(
    listener: Listener, pool: ThreadPoolExecutor
) -> None:
    """At once, not with the error that is kept for a log."""
    leader = pool.submit(listener.wait_for_any_follower, 20)
    searching = pool.submit(search(listener).find)
    _, control = leader.result(20)
    control.send(Kind.LEAVE, timeout=20)
    error = searching.exception(20)
    assert isinstance(error, ChannelError), error
    with pytest.raises(ConnectionClosedError, match="closed the connection"):
        control.receive(timeout=20)
    control.close()


def test_what_is_not_a_leader_may_become_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another program has the port; it ends, and the leader gets it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        speaker = Connector("127.0.0.1", port, tls_context(SECRET, "follower"), LIMIT)
        with pytest.raises(RefusedError, match="the program there does not speak this protocol"):
            speaker.connect(CONTROL)
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"", r"accepts connections, but closes them before they are authenticated: port forwarding \(docker-proxy"),
        (None, r"accepts connections, but sends nothing within 0\.3 s: another program has the port, or a leader"),
    ],
    ids=["closes", "silent"],
)
def test_a_port_without_a_leader_behind_it_is_reported(
    answer: bytes | None,
    seen: str,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And the leader that gets the port at last is followed. The same reason is logged at growing intervals."""
    monkeypatch.setattr("vllm_spark.executor.handshake.client.GREETING_TIMEOUT", 0.3)
    monkeypatch.setattr(leader_search, "_FIRST_LOG", 0.5)
    monkeypatch.setattr(leader_search, "_RETRY_INTERVAL", 0.05)
    with program_at(answer) as port:
        searching = LeaderSearch(
            SparkConfig(),
            lambda: Connector("127.0.0.1", port, tls_context(SECRET, "follower"), LIMIT),
            lambda *given: None,
            lambda environment: None,
            once=False,
        )
        found = pool.submit(searching._wait_for_leader, searching._make_connector())
        wait_for(lambda: messages(caplog, f"Waiting for a leader at .*{seen}"), "it says what it sees")
        (line,) = messages(caplog, seen)
        assert f"there, `sudo ss -ltnp 'sport = :{port}'` shows which one" in line
    made = Listener("127.0.0.1", port, tls_context(SECRET, "leader"), LIMIT)
    try:
        found.result(20).close()
    finally:
        made.close()


@pytest.mark.parametrize("protocol", [None, PROTOCOL], ids=["a server", "a proxy that passes the protocol on"])
def test_a_foreign_certificate_is_not_another_secret(
    tmp_path: Path, protocol: str | None, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """The follower waits on: the exit code of another secret would keep systemd from starting it again."""
    context = foreign_context(tmp_path)
    if protocol is not None:
        context.set_alpn_protocols([protocol])
    with program_at(context) as port:
        connector = Connector("127.0.0.1", port, tls_context(SECRET, "follower"), LIMIT)
        with pytest.raises(RefusedError, match=r"issued by O=Example Proxies, CN=Interception CA; it is"):
            connector.connect(CONTROL)
        searching = LeaderSearch(
            SparkConfig(), lambda: connector, lambda *given: None, lambda environment: None, once=False
        )
        found = pool.submit(searching.find)
        wait_for(lambda: messages(caplog, "not vllm_spark: its TLS certificate.*Retrying the leader"), "it retries")
        assert not found.done()
        searching._once = True
        with pytest.raises(RefusedError):
            found.result(10)


def test_another_secret_names_where_this_one_was_read(listener: Listener, tmp_path: Path) -> None:
    source = secret_source(SparkConfig(secret_file=tmp_path / "secret"), "10.0.0.1", {})
    connector = caller(listener, OTHER)
    connector._secret_source = source
    with pytest.raises(ConfigurationError) as caught:
        connector.connect(CONTROL)
    assert f"another secret than the one that this side reads from the file {tmp_path}/secret; give" in str(
        caught.value
    )
    assert secret_source(SparkConfig(), "10.0.0.1", {"VLLMSPARK_SECRET": "x"}) == "the variable VLLMSPARK_SECRET"


def test_a_follower_that_takes_its_time_says_what_it_does(
    listener: Listener,
    tmp_path: Path,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The leader waits for as long as it does: a download may take hours."""
    monkeypatch.setattr(leader_search, "PROGRESS_INTERVAL", 0.1)
    monkeypatch.setattr("vllm_spark.executor.handshake.server._OFFER_TIMEOUT", 1.0)
    model = model_at(tmp_path / "model")
    offer, downloaded = offer_of(model), threading.Event()

    def find(wanted: LoadedFiles, say: Any, **more: Any) -> Path:
        say(f"downloading {wanted.name}")
        assert downloaded.wait(30)
        return model

    monkeypatch.setattr(leader_search, "find_own", find)
    leader = accepted(listener, offer, pool)
    follower = pool.submit(follow, search(listener))
    wait_for(lambda: messages(caplog, r"The follower on .* is downloading .*model\."), "the leader logs it")
    threading.Timer(2.0, downloaded.set).start()  # longer than the leader waits for silence
    follower.result(30)
    leader.result(30)
