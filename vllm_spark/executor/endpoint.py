"""Where one side listens for the other, as sockets and messages have it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_spark.errors import ConfigurationError

_QUEUE = 64  # connections that wait to be accepted


def listen(address: str, port: int) -> socket.socket:
    """A TCP socket that listens on `address`:`port` and on nothing else.

    Raises:
        ConfigurationError: that is taken, not allowed, or no address of this machine; the sentence says what to change.
    """
    with _explained(address, port):
        listening = _bound(address, port)
        try:
            listening.listen(_QUEUE)  # the kernel lets two bind one port, and the second of them fails here
        except OSError:
            listening.close()
            raise
    return listening


def check_free(address: str, port: int) -> None:
    """Makes sure that `listen` can be called, as far as can be seen now. A follower that tries to connect meets nobody.

    Raises:
        ConfigurationError: as `listen`.
    """
    with _explained(address, port):
        _bound(address, port).close()


def _bound(address: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        # Or the port could not be used while the kernel remembers its last connections.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
    except OSError:
        bound.close()
        raise
    return bound


@contextmanager
def _explained(address: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = (
            "end what listens there (a leader or a doctor that runs already?), or choose another port with --spark-port"
        )
        if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
            remedy = "give this machine's address on the link with --spark-address"
        raise ConfigurationError(
            f"cannot listen on {format_endpoint(address, port)} ({error.strerror}); {remedy}"
        ) from None


def format_endpoint(host: str, port: int) -> str:
    """`10.0.0.1:29650`, `[fe80::1]:29650`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_name() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()
