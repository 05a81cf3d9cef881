"""The thread that carries announcements out of band: its end."""

from __future__ import annotations

import os
import threading

import pytest

from vllm_spark.collective.link_thread import LinkThread


class Native:
    """A native runtime that has something to say whenever it is asked."""

    def __init__(self) -> None:
        self.link_ready = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def take_announcement(self) -> bytes:
        return b"farewell"

    def take_log(self) -> list[str]:
        return []


@pytest.fixture
def native() -> Native:
    return Native()


def test_it_may_be_stopped_again(native: Native) -> None:
    """A runtime may be closed again: the descriptor may be somebody else's by then."""
    said: list[bytes] = []
    keeper = LinkThread(native, said.append)
    keeper.start()
    keeper.stop()
    assert said[-1] == b"farewell"
    keepers_descriptor_is_anothers = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    keeper.stop()
    for descriptor in keepers_descriptor_is_anothers:
        with pytest.raises(BlockingIOError):  # nobody wrote to it
            os.eventfd_read(descriptor)
        os.close(descriptor)
    keeper.stop()


def test_a_keeper_that_is_held_up_ends_later(native: Native) -> None:
    """Whoever stops it does not wait for an announcement that is stuck, and nothing is left open after it."""
    stuck, go_on = threading.Event(), threading.Event()

    def announce(announcement: bytes) -> None:
        stuck.set()
        assert go_on.wait(60)

    keeper = LinkThread(native, announce)
    keeper.start()
    os.eventfd_write(native.link_ready, 1)
    assert stuck.wait(60)
    keeper.stop()
    assert keeper.is_alive()
    go_on.set()
    keeper.join(60)
    assert not keeper.is_alive()
    assert keeper._end.fileno() == -1
    keeper.stop()
