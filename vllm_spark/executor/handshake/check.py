"""The check of a leader's port for `vllm-spark doctor --leader`: finds out what listens there, and joins nothing.

It announces itself as the doctor in the TLS handshake, so that a leader logs it as a check and not as a rejected
connection. With a secret it sends a HELLO, which a leader answers as it would answer a follower's.
"""

from __future__ import annotations

import os
import secrets
import socket
import ssl
from typing import Literal, NamedTuple

from vllm_spark.executor.channel.addresses import format_endpoint, host_name
from vllm_spark.executor.channel.certificates import DOCTOR_PROTOCOL, inspecting_context, tls_context
from vllm_spark.executor.channel.framing import MIB, ChannelError, Connection, Kind
from vllm_spark.executor.channel.tls import HandshakeError, TlsConnection, explain_failure
from vllm_spark.executor.handshake.client import no_handshake
from vllm_spark.executor.handshake.messages import CHECK, GREETING_TIMEOUT, Hello, Reason, Welcome, decode_frame
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.records import to_json

Outcome = Literal["nothing listens", "unreachable", "leader", "refusal", "no secret", "other secret", "other program"]
"""What is at the port. `refusal`: a leader that would refuse a follower now; `no secret`: a vllm_spark, without a secret
here to compare."""


class Answer(NamedTuple):
    """What is at the port, and a sentence part about it without a full stop."""

    outcome: Outcome
    sentence: str
    is_final: bool = False
    """Of a refusal: whether a retry cannot succeed, since versions differ."""


def check_leader(host: str, port: int, secret: bytes | None, secret_source: str = "") -> Answer:
    """Connects to `host`:`port` and finds out what answers; takes at most four times GREETING_TIMEOUT.

    Args:
        secret: the shared secret; None if this machine has none.
        secret_source: where it comes from, for the sentence.
    """
    endpoint = format_endpoint(host, port)
    try:
        plain = socket.create_connection((host, port), timeout=GREETING_TIMEOUT)
    except ConnectionRefusedError:
        return Answer("nothing listens", f"{endpoint} can be reached, nothing listens there now")
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
        return Answer("unreachable", f"{endpoint}: {reason}")
    context = inspecting_context() if secret is None else tls_context(secret, "follower", DOCTOR_PROTOCOL)
    try:
        tls = TlsConnection(plain, context, server_side=False, timeout=GREETING_TIMEOUT)
    except HandshakeError as error:
        if not isinstance(error.cause, ssl.SSLError):
            return Answer("other program", no_handshake(endpoint, error))
        outcome: Outcome = "other secret" if error.is_other_secret else "other program"
        return Answer(outcome, f"{endpoint}: {explain_failure(error, secret_source)}")
    connection = Connection(tls, f"the leader at {endpoint}", MIB)
    try:
        if secret is None:
            return _without_secret(tls, endpoint)
        return _ask(connection, endpoint)
    except ChannelError as error:
        return Answer(
            "other program",
            f"{endpoint} has this secret, and did not answer the check: {error}; is it another version?",
        )
    finally:
        connection.close()


def _without_secret(tls: TlsConnection, endpoint: str) -> Answer:
    if tls.is_of_this_project:
        return Answer(
            "no secret", f"vllm_spark listens at {endpoint}; without a secret here the two cannot be compared"
        )
    return Answer("other program", f"{endpoint} is not vllm_spark: its TLS certificate was issued by {tls.issuer}")


def _ask(connection: Connection, endpoint: str) -> Answer:
    if (role := connection.peer_role) != "leader":
        return Answer("other program", f"{endpoint} authenticated as {role!r}, not as a leader")
    hello = Hello(CHECK, secrets.token_hex(16), host_name(), os.getpid(), Versions.of_this_process())
    connection.send(Kind.HELLO, to_json(hello), timeout=GREETING_TIMEOUT)
    frame = connection.expect(Kind.WELCOME, Kind.REFUSAL, timeout=GREETING_TIMEOUT)
    if frame.kind is Kind.REFUSAL:
        reason = decode_frame(frame, Reason)
        return Answer(
            "refusal", f"a leader listens at {endpoint}, with the same secret: {reason.sentence}", reason.final
        )
    leader = decode_frame(frame, Welcome)
    return Answer(
        "leader",
        f"a leader on {leader.host} (process {leader.process}) waits at {endpoint}, with the same secret and versions",
    )
