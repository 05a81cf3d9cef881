"""The client side of the handshake: opens a follower's connections to its leader."""

from __future__ import annotations

import os
import secrets
import socket
import ssl

from vllm_spark.config.settings import SparkConfig, split_endpoint
from vllm_spark.errors import ConfigurationError, RefusedError, VersionsError, upper_first
from vllm_spark.executor.channel.addresses import format_endpoint, host_name
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import MIB, ChannelError, Connection, Kind
from vllm_spark.executor.channel.secret import load_secret, secret_source
from vllm_spark.executor.channel.tls import HandshakeError, TlsConnection, explain_failure
from vllm_spark.executor.handshake.messages import GREETING_TIMEOUT, Hello, Reason, decode_frame
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.records import to_json


class Connector:
    """Opens the connections of one session.

    Args:
        host, port: where the leader listens.
        context: TLS context of the follower.
        max_frame: limit of one message, in bytes.
        secret_source: where the secret comes from, for errors; see `channel.secret.secret_source`.
        session: of which session; a new one by default.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: ssl.SSLContext,
        max_frame: int,
        secret_source: str = "",
        session: str | None = None,
    ) -> None:
        self.host, self.port, self._context, self._max_frame = host, port, context, max_frame
        self._secret_source = secret_source
        self.session = session or secrets.token_hex(16)
        self._versions = Versions.of_this_process()
        self.endpoint = format_endpoint(host, port)
        self.last_problem = ""
        """Why the last attempt to connect failed, as a sentence with a full stop; empty if nothing listens there."""

    def connect(self, connection: str) -> Connection | None:
        """Opens one connection; None if no leader answers there now, and `last_problem` says why.

        Raises:
            ConfigurationError: the leader has another secret.
            VersionsError: it has other versions.
            RefusedError: it gave another reason, or the program there is not a vllm-spark leader.
        """
        try:
            plain = socket.create_connection((self.host, self.port), timeout=GREETING_TIMEOUT)
        except ConnectionRefusedError:
            self.last_problem = ""
            return None
        except OSError as error:
            problem = "does not answer" if isinstance(error, TimeoutError) else f"cannot be reached ({error.strerror})"
            self.last_problem = (
                f"{self.endpoint} {problem}: a firewall there may keep TCP port {self.port} closed, its machine may be "
                "off, or the address is wrong."
            )
            return None
        self.last_problem = ""
        opened: Connection | None = None
        try:
            tls = TlsConnection(plain, self._context, server_side=False, timeout=GREETING_TIMEOUT)
            opened = Connection(tls, f"the leader at {self.endpoint}", self._max_frame)
            if (role := opened.peer_role) != "leader":
                opened.close()
                raise RefusedError(
                    f"{self.endpoint} authenticated as {role!r}, not as a leader; give the address of the machine that "
                    "runs vllm serve --spark"
                )
            hello = Hello(connection, self.session, host_name(), os.getpid(), self._versions)
            opened.send(Kind.HELLO, to_json(hello), timeout=GREETING_TIMEOUT)
            answer = opened.expect(Kind.WELCOME, Kind.REFUSAL, timeout=GREETING_TIMEOUT)
        except HandshakeError as error:
            if error.is_other_secret or isinstance(error.cause, ssl.SSLError):
                kind = ConfigurationError if error.is_other_secret else RefusedError
                raise kind(f"{self.endpoint}: {explain_failure(error, self._secret_source)}") from None
            self.last_problem = f"{upper_first(no_handshake(self.endpoint, error))}."
            return None
        except ChannelError as error:
            if opened is not None:
                opened.close()
            self.last_problem = f"A leader at {self.endpoint} authenticated, and did not answer: {error}."
            return None
        if answer.kind is Kind.REFUSAL:
            opened.close()
            reason = decode_frame(answer, Reason)
            refusal = VersionsError if reason.final else RefusedError
            raise refusal(f"the leader at {self.endpoint} refused: {reason.sentence}")
        return opened


def make_connector(config: SparkConfig, host: str, port: int, session: str | None = None) -> Connector:
    """A connector of a follower with these settings.

    Args:
        config: the follower's.
        host, port: where the leader listens.
        session: of which session; a new one by default.

    Raises:
        ConfigurationError: there is no valid secret.
    """
    context = tls_context(load_secret(config, host), "follower")
    return Connector(host, port, context, config.max_frame_mib * MIB, secret_source(config, host), session)


def no_handshake(endpoint: str, error: HandshakeError) -> str:
    """A sentence without a full stop: something accepts connections at `endpoint`, but does no TLS handshake."""
    if isinstance(error.cause, TimeoutError):
        did = f"accepts connections, but sends nothing within {GREETING_TIMEOUT:g} s"
        who = "another program has the port, or a leader there hangs"
    else:
        did = "accepts connections, but closes them before they are authenticated"
        who = "port forwarding (docker-proxy, ssh -L) without a leader behind it, or another program, has the port"
    return f"{endpoint} {did}: {who}; there, `{listener_command(endpoint)}` shows which one"


def listener_command(endpoint: str) -> str:
    """The command that shows which program listens at the port of `endpoint`, for that machine."""
    return f"sudo ss -ltnp 'sport = :{split_endpoint(endpoint)[1]}'"
