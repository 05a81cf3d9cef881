"""The key-value store through which torch's process groups find each other; it ends when the pair breaks.

torch would wait in it for a follower that is dead, for half an hour. It does not wait in a store that is gone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from vllm_spark.executor.endpoint import listen
from vllm_spark.ranks import LEADER_RANK, WORLD_SIZE

INIT_METHOD = "spark://leader"
"""How torch is told to use the store that this process serves."""

_serving: weakref.ref[LeaderStore] | None = None


class LeaderStore:
    """The leader's store, on the link's address alone, and where its process groups get it from.

    The socket listens from here on, so that no other process can take the port between choosing and using it.

    Args:
        address: where it listens.
        check: called before this process uses the store; raises if it shall not.

    Raises:
        ConfigurationError: the address cannot be listened on.
    """

    def __init__(self, address: str, check: Callable[[], None]) -> None:
        from torch.distributed import TCPStore, distributed_c10d, is_initialized, register_rendezvous_handler

        global _serving
        listening = listen(address, 0)
        self.address, self.port, self._check = address, int(listening.getsockname()[1]), check
        # torch takes over the descriptor and closes it with the store.
        self._store: Any = TCPStore(
            address, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self._lock = threading.Lock()
        if _serving is None:
            register_rendezvous_handler("spark", _rendezvous)
        _serving = weakref.ref(self)
        if not is_initialized():
            # A start that failed in this process has counted its group, and torch names the next one by that count.
            # The follower's process is a new one.
            distributed_c10d._world.group_count = 0

    def connect(self, timeout: timedelta) -> Any:
        """A client of the store, for this process's groups.

        Raises:
            SparkError: the pair is broken.
        """
        from torch.distributed import TCPStore

        with self._lock:  # a client that came to a store that is just gone would try again until its time-out
            self._check()
            return TCPStore(self.address, self.port, WORLD_SIZE, is_master=False, timeout=timeout)

    def close(self) -> None:
        """Ends the store: whoever waits in it gets an error."""
        with self._lock:
            self._store = None


def _rendezvous(url: str, timeout: timedelta, **_: Any) -> Iterator[tuple[Any, int, int]]:
    store = None if _serving is None else _serving()
    assert store is not None, "vLLM initializes its process groups while the pair starts"
    yield store.connect(timeout), LEADER_RANK, WORLD_SIZE
