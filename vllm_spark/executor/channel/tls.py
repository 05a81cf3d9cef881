"""TLS over a socket, with one system call for a message each way.

`ssl.SSLSocket` reads every record with two system calls and writes through several layers of Python. Here OpenSSL works
on memory, and the socket is read and written in whole messages, so that a decode step's call reaches the follower
sooner (benchmarks/channel.py). A receiver may poll the socket for a while before it sleeps, because waking up costs
about as much as the message itself (benchmarks/spine.py).
"""

from __future__ import annotations

import contextlib
import datetime
import os
import select
import socket
import ssl
import threading
import time
from typing import cast

from vllm_spark.config.settings import SECRET_VARIABLE, flag_name
from vllm_spark.errors import without_stop
from vllm_spark.executor.channel.certificates import AUTHORITY_NAME, DOCTOR_PROTOCOL, PROTOCOL

# TCP keepalive, for a machine that lost its power: idle time, interval, and number of probes.
_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 5, 2, 4
_DATE_ERRORS = {9: "not valid yet", 10: "no longer valid"}  # by OpenSSL's number of the error
# A peer's TLS alerts in these cases. For another secret its alert is "unknown CA".
_DATE_ALERTS = frozenset({"SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_EXPIRED"})
_AUTHORITY = f"CN={AUTHORITY_NAME}"
_SHORT_NAMES = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C"}
_TLS_RECORDS = (b"\x15", b"\x16")  # first byte of a TLS peer's answer: an alert, a handshake message
_BANNER = 60  # characters of another program's first line that an error quotes
_READ = 256 << 10  # bytes asked of the socket at once: a decode step's call arrives in one piece


class HandshakeError(OSError):
    """A TLS handshake that failed.

    Attributes:
        cause: ssl.SSLError if the peer is not authenticated or does not speak TLS; TimeoutError if it sent nothing in
            time; another OSError if the connection broke.
        protocol: what a client announced or a server accepted (ALPN); None if nothing.
        issuer: issuer of the certificate that a server sent, as `CN=...`; None if it sent none, and on the server side.
        banner: the first line that a server sent, if it is not TLS; else empty.
    """

    def __init__(self, cause: OSError, protocol: str | None, issuer: str | None, banner: str) -> None:
        super().__init__(str(cause))
        self.cause, self.protocol, self.issuer, self.banner = cause, protocol, issuer, banner

    @property
    def is_of_this_project(self) -> bool:
        """Whether the peer is vllm_spark, with any secret, as far as an unauthenticated peer can show that."""
        return _is_of_this_project(self.issuer, self.protocol)

    @property
    def is_other_secret(self) -> bool:
        """Whether the peer is vllm_spark and has another secret."""
        if not isinstance(self.cause, ssl.SSLError) or "DID_NOT_RETURN" in (self.cause.reason or ""):
            return False  # the latter: a peer without any secret
        return self.is_of_this_project and _is_not_trusted(self.cause)


class TlsConnection:
    """An authenticated connection. Owns the socket.

    One thread may send while another receives; two may not do the same. `interrupt` is for any thread.

    Args:
        plain: a connected socket.
        context: how to authenticate.
        server_side: True on the side that accepted the connection.
        timeout: seconds for the handshake.

    Raises:
        HandshakeError: the peer is not authenticated or does not speak TLS, the connection broke, or the handshake took
            too long. The socket is closed then.
    """

    def __init__(self, plain: socket.socket, context: ssl.SSLContext, *, server_side: bool, timeout: float) -> None:
        self._socket = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        # Guards OpenSSL's object, which sending and receiving share; never held during a wait.
        self._state = threading.Lock()
        self._buffer = memoryview(bytearray(_READ))
        self._first = b""  # what the peer sent first
        self._server_side = server_side
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.set_keepalive(True)
            plain.settimeout(timeout)
            self._handshake(time.monotonic() + timeout)
            plain.settimeout(None)
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._flush()  # sends the TLS alert with the reason
            plain.close()
            if isinstance(error, OSError):
                raise HandshakeError(error, self.protocol, self.issuer, self._banner()) from error
            raise

    @property
    def protocol(self) -> str | None:
        """The ALPN protocol that the client announced and the server accepted; None without."""
        return self._tls.selected_alpn_protocol()

    @property
    def is_of_this_project(self) -> bool:
        """Whether the peer is vllm_spark, with any secret. It may still be any program if nothing is verified."""
        return _is_of_this_project(self.issuer, self.protocol)

    @property
    def issuer(self) -> str | None:
        """The issuer of the server's certificate, verified or not, as `CN=...`; None on the server side."""
        if self._server_side:
            return None
        # Public from Python 3.13 on, and not with the names; `getpeercert` works after a handshake that succeeded.
        chain = self._tls._sslobj.get_unverified_chain()  # type: ignore[attr-defined]
        try:
            names = chain[0].get_info()["issuer"] if chain else None
        except (ssl.SSLError, ValueError, KeyError):
            return "an issuer that cannot be read"
        if names is None:
            return None
        parts = [f"{_SHORT_NAMES.get(key, key)}={value}" for name in names for key, value in name]
        return ", ".join(parts) or "no issuer"

    @property
    def peer_name(self) -> str:
        """The common name in the peer's certificate."""
        certificate = self._tls.getpeercert() or {}
        for relative_name in certificate.get("subject", ()):
            for attribute in relative_name:
                if attribute[0] == "commonName":
                    return str(attribute[1])
        return ""

    @property
    def pending(self) -> bool:
        """True if bytes are buffered here, which a poll of the socket does not show."""
        return self._tls.pending() > 0 or self._incoming.pending > 0

    @property
    def peer_address(self) -> str:
        """The IP address of the peer; an OSError if it has closed the connection."""
        return str(self._socket.getpeername()[0])

    def fileno(self) -> int:
        """The socket's descriptor; -1 once closed."""
        return self._socket.fileno()

    def send(self, data: bytes, timeout: float | None) -> None:
        """Sends all of `data`. Raises OSError (TimeoutError after `timeout` seconds) or ssl.SSLError."""
        self.send_parts(timeout, data)

    def send_parts(self, timeout: float | None, *parts: bytes | memoryview) -> None:
        """Sends all of `parts`, without putting them together before. Raises as `send`."""
        with self._state:
            for part in parts:
                self._tls.write(part)
        if timeout is None:
            self._flush()
            return
        self._socket.settimeout(timeout)
        try:
            self._flush()
        finally:
            self._socket.settimeout(None)

    def receive_into(self, view: memoryview, deadline: float | None, spin: float = 0.0) -> None:
        """Fills `view`, polling without sleeping for the first `spin` seconds.

        Raises EOFError at the end of the stream, OSError (TimeoutError), or ssl.SSLError.
        """
        got, size, read = 0, len(view), self._tls.read
        while got < size:
            try:
                with self._state:
                    while got < size:  # one record at a time, and many may be here
                        # With a buffer, `read` returns the count; the stubs only know of the form that returns bytes.
                        count = cast("int", read(size - got, view[got:] if got else view))
                        if count == 0:  # the peer ended the TLS session
                            raise EOFError
                        got += count
            except ssl.SSLWantReadError:
                self._fill(deadline, spin)
            except ssl.SSLZeroReturnError:
                raise EOFError from None

    def set_keepalive(self, on: bool) -> None:
        """Turns TCP keepalive on or off: it detects a peer that is gone while no heartbeats are exchanged."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, on)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)

    def interrupt(self) -> None:
        """Ends a blocked call of another thread with an error."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket; may be called again."""
        self.interrupt()
        self._socket.close()

    def _handshake(self, deadline: float) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                try:
                    count = self._fill(deadline)
                except EOFError:
                    raise ConnectionResetError("the peer closed the connection") from None
                self._first = self._first or bytes(self._buffer[: min(count, _BANNER)])
            else:
                self._flush()
                return

    def _banner(self) -> str:
        # A server's log must not depend on what strangers send: it sums up rejections by their reason.
        if self._server_side or not self._first or self._first.startswith(_TLS_RECORDS):
            return ""
        line = self._first.strip().partition(b"\n")[0].strip().decode("ascii", "replace")
        return "".join(letter if letter.isascii() and letter.isprintable() else "?" for letter in line)

    def _fill(self, deadline: float | None, spin: float = 0.0) -> int:
        count = self._try_receive(spin) if spin else None
        if count is None:
            self._wait_readable(deadline)
            count = self._socket.recv_into(self._buffer)
        if count == 0:
            raise EOFError
        with self._state:
            self._incoming.write(self._buffer[:count])
        return count

    def _try_receive(self, seconds: float) -> int | None:
        end = time.monotonic() + seconds
        while True:
            try:
                return self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if time.monotonic() >= end:
                    return None
                os.sched_yield()  # other threads may use this core

    def _wait_readable(self, deadline: float | None) -> None:
        if deadline is None:
            return  # the socket blocks
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1e3):
            raise TimeoutError("timed out")

    def _flush(self) -> None:
        with self._state:
            data = self._outgoing.read()
        if data:
            self._socket.sendall(data)


def explain_failure(error: Exception, secret_source: str = "") -> str:
    """A sentence for users: why a connection was not established.

    Args:
        error: what `TlsConnection` or a message of the handshake raised.
        secret_source: where this side's secret comes from, as `the file /home/me/secret`; empty if not known.
    """
    if isinstance(error, HandshakeError):
        return _explain_handshake(error, secret_source)
    if isinstance(error, OSError):
        return f"the connection broke before it was authenticated ({error.strerror or error})"
    return without_stop(str(error))


def _explain_handshake(error: HandshakeError, secret_source: str) -> str:
    cause = error.cause
    if not isinstance(cause, ssl.SSLError):
        return f"the connection broke before it was authenticated ({cause.strerror or cause})"
    if (problem := _date_problem(cause)) is not None:
        return problem
    if error.is_other_secret:
        own = f" than the one that this side reads from {secret_source}" if secret_source else ""
        return (
            f"the other side has another secret{own}; give both machines the same "
            f"({flag_name('secret_file')} or {SECRET_VARIABLE})"
        )
    if error.banner:
        return f"the program there does not speak this protocol (it sent {error.banner!r})"
    if error.issuer is not None and not error.is_of_this_project:
        return (
            f"the program there is not vllm_spark: its TLS certificate was issued by {error.issuer}; it is another "
            "server, or a proxy that intercepts TLS"
        )
    if _is_not_trusted(cause):  # on the leader
        return "a TLS client that is not vllm_spark, or another version of it, has no certificate of this secret"
    reason = (cause.reason or str(cause)).replace("_", " ").lower()
    return f"the program there does not speak this protocol ({reason})"


def _is_of_this_project(issuer: str | None, protocol: str | None) -> bool:
    """A server's certificate counts, since a proxy that intercepts TLS may pass the protocol on."""
    return protocol in (PROTOCOL, DOCTOR_PROTOCOL) if issuer is None else issuer == _AUTHORITY


def _is_not_trusted(error: ssl.SSLError) -> bool:
    """Whether one side does not accept the other's certificate, for another reason than its dates."""
    if _date_problem(error) is not None:
        return False
    reason = (error.reason or "").upper()
    rejected = any(part in reason for part in ("UNKNOWN_CA", "DECRYPT_ERROR", "CERTIFICATE"))
    return rejected or isinstance(error, ssl.SSLCertVerificationError)


def _date_problem(error: ssl.SSLError) -> str | None:
    """The sentence for a certificate that either side refuses only because of its dates; else None.

    This version's certificates are valid at all times; those of another one may begin and end.
    """
    reason = (error.reason or "").upper()
    refused = getattr(error, "verify_code", 0) if isinstance(error, ssl.SSLCertVerificationError) else 0
    if refused in _DATE_ERRORS:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (
            f"the other side's certificate is {_DATE_ERRORS[refused]} by the clock of this machine, which says "
            f"{now:%Y-%m-%d %H:%M} UTC; set the clock (timedatectl) and install the same vllm_spark on both machines"
        )
    if reason in _DATE_ALERTS:
        return (
            "the other side does not accept the dates of this side's certificate: its clock is wrong, or it has "
            "another vllm_spark; set the clock there (timedatectl) and install the same vllm_spark on both machines"
        )
    return None
