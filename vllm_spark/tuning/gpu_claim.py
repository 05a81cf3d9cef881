"""One tuner at a time on a GPU: two would measure each other."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager

from vllm_spark.errors import SparkError


@contextmanager
def claim(gpu: str) -> Iterator[None]:
    """While inside, no other process gets in with the same `gpu`, whoever runs it.

    The claim is a name in the kernel (an abstract socket), so it is gone with its process, however that ends.
    Containers with networks of their own have such names of their own, and do not see each other.

    Args:
        gpu: what names this GPU and no other: its UUID.

    Raises:
        SparkError: another process has it.
    """
    with closing(socket.socket(socket.AF_UNIX)) as name:
        try:
            name.bind(f"\0vllm-spark tune {gpu}")
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SparkError(f"the GPU {gpu} cannot be claimed ({error.strerror})") from None
            raise SparkError(
                f"another vllm-spark tune is at work on this GPU ({gpu}), and two would measure each other; wait for "
                "its end, or end it"
            ) from None
        yield
