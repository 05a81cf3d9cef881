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
        return b"last announcement"

    def take_log(self) -> list[str]:
        return []


@pytest.fixture
def native() -> Native:
    return Native()


def test_it_may_be_stopped_again(native: Native) -> None:
    """A runtime may be closed again: the descriptor may be somebody else's by then."""
    said: list[bytes] = []
    link_thread = LinkThread(native, said.append)
    link_thread.start()
    link_thread.stop()
    assert said[-1] == b"last announcement"
    reused_descriptors = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    link_thread.stop()
    for descriptor in reused_descriptors:
        with pytest.raises(BlockingIOError):  # nobody wrote to it
            os.eventfd_read(descriptor)
        os.close(descriptor)
    link_thread.stop()


def test_a_link_thread_that_is_delayed_ends_later(native: Native) -> None:
    """Whoever stops it does not wait for an announcement that is stuck, and nothing is left open after it."""
    stuck, go_on = threading.Event(), threading.Event()

    def announce(announcement: bytes) -> None:
        stuck.set()
        assert go_on.wait(60)

    link_thread = LinkThread(native, announce)
    link_thread.start()
    os.eventfd_write(native.link_ready, 1)
    assert stuck.wait(60)
    link_thread.stop()
    assert link_thread.is_alive()
    go_on.set()
    link_thread.join(60)
    assert not link_thread.is_alive()
    assert link_thread._stop_requested.fileno() == -1
    link_thread.stop()
