"""Where one side listens for the other, as sockets and messages have it."""

from __future__ import annotations

import socket

from vllm_spark.errors import ConfigurationError


def bind(address: str, port: int) -> socket.socket:
    """A TCP socket bound to `address`:`port` and to nothing else.

    Raises:
        ConfigurationError: it is taken or not allowed; the sentence says which flag to change.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((address, port))
    except OSError as error:
        bound.close()
        raise ConfigurationError(
            f"cannot listen on {format_endpoint(address, port)} ({error.strerror}); "
            "choose another port with --spark-port, or end the process that holds it"
        ) from None
    return bound


def format_endpoint(host: str, port: int) -> str:
    """`10.0.0.1:29650`, `[fe80::1]:29650`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_name() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()
