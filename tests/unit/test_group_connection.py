"""The groups connection's receiving thread, and the leader's table of the store, over real connections."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from vllm_spark.backend.process_group import PairGroup
from vllm_spark.errors import PeerLostError, SparkError
from vllm_spark.executor import heartbeat
from vllm_spark.executor.channel.framing import ChannelError, Connection, ConnectionClosedError, Kind
from vllm_spark.executor.group_connection import GroupConnection, Head, encode_piece
from vllm_spark.executor.store import PairStore, Request, Table
from vllm_spark.ranks import LEADER_RANK
from vllm_spark.records import to_json

from .test_channel import connections

SECONDS = 20.0
UNREADABLE = "the follower sent a message of a process group that cannot be read: "
ADDRESS = ("0", "collectives", 0)


class Opened:
    """This side's link, the far end of its connection, and the reasons for which the link ended the work."""

    def __init__(self) -> None:
        self.ended: queue.Queue[SparkError] = queue.Queue()
        near, self.far = connections()
        self.link = GroupConnection(near, self.ended.put)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    monkeypatch.setattr(heartbeat, "_CLOSED_GRACE", 0.2)
    made = Opened()
    yield made
    made.link.close(PeerLostError("the test is over"))
    made.far.close()


def unreadable(far: Connection) -> None:
    far.send(Kind.GROUP, b"\x02\x00\x00\x00{]")


def without_a_head(far: Connection) -> None:
    far.send(Kind.GROUP, b"\x05\x00\x00")


def with_a_head_beyond_its_end(far: Connection) -> None:
    far.send(Kind.GROUP, (1 << 31).to_bytes(4, "little") + b"{}")


def of_a_negative_length(far: Connection) -> None:
    far.send(Kind.GROUP, encode_piece(Head("0", "collectives", 0, "barrier", -1), b""))


def longer_than_its_message(far: Connection) -> None:
    far.send(Kind.GROUP, encode_piece(Head("0", "collectives", 0, "barrier", 2), b"abc"))


def a_request_that_is_none(far: Connection) -> None:
    far.send(Kind.GROUP, encode_piece(Head("", "store requests", 0, "", 2), b"[]"))


def of_another_connection(far: Connection) -> None:
    far.send(Kind.HEARTBEAT, b"{}")


def closed(far: Connection) -> None:
    far.close()


def a_bad_request(far: Connection) -> None:
    request = to_json(Request("jump", ["key"], []))
    far.send(Kind.GROUP, encode_piece(Head("", "store requests", 0, "", len(request)), request))


@pytest.mark.parametrize(
    ("act", "kind", "sentence"),
    [
        (unreadable, ChannelError, f"{UNREADABLE}invalid JSON: "),
        (without_a_head, ChannelError, f"{UNREADABLE}a piece of 3 bytes is shorter than the length of its head"),
        (with_a_head_beyond_its_end, ChannelError, f"{UNREADABLE}a head of 2147483648 bytes in a piece of 6 bytes"),
        (of_a_negative_length, ChannelError, f"{UNREADABLE}total: input should be greater than or equal to 0"),
        (longer_than_its_message, ChannelError, f"{UNREADABLE}3 bytes of a message of 2 bytes"),
        (a_request_that_is_none, ChannelError, f"{UNREADABLE}input should be an object"),
        (of_another_connection, ChannelError, "the follower sent HEARTBEAT, and GROUP was expected"),
        (closed, ConnectionClosedError, "the follower closed the connection"),
        (a_bad_request, SparkError, "the thread of the process groups failed: ValueError: the store has no operation"),
    ],
)
def test_a_receiver_that_ends_ends_the_work(
    opened: Opened, act: Callable[[Connection], None], kind: type[SparkError], sentence: str
) -> None:
    """Also while nobody waits for a message."""
    PairStore(opened.link, LEADER_RANK)
    act(opened.far)
    error = opened.ended.get(timeout=SECONDS)
    assert type(error) is kind
    assert str(error).startswith(sentence)
    with pytest.raises(kind):
        opened.link.take(ADDRESS, "barrier", SECONDS)


def test_the_known_cause_comes_first(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control connection knows why the connection ended, and has ended the work: nothing is added."""
    monkeypatch.setattr(heartbeat, "_CLOSED_GRACE", SECONDS)
    opened.far.close()
    with pytest.raises(ConnectionClosedError):
        opened.link.take(ADDRESS, "barrier", SECONDS)
    opened.link.fail(PeerLostError("the follower left"))
    opened.link._receiver.join(SECONDS)
    assert not opened.link._receiver.is_alive()
    assert opened.ended.empty()


def test_the_link_can_be_closed_from_its_own_thread() -> None:
    """What ends the work may release everything at once."""
    (near, far), closed = connections(), queue.Queue[SparkError]()
    links: list[GroupConnection] = []

    def end_session(error: SparkError) -> None:
        links[0].close(error)
        closed.put(error)

    links.append(GroupConnection(near, end_session))
    unreadable(far)
    assert "cannot be read" in str(closed.get(timeout=SECONDS))
    far.close()


def test_a_receive_of_a_broken_pair_is_completed(opened: Opened) -> None:
    """Whoever polls it comes to an end, and `wait` says why, as often as it is called."""
    import torch

    group = PairGroup(opened.link, "0", 0, 2, timedelta(minutes=30))
    work = group.recv([torch.zeros(1)], 1)
    assert not work.is_completed()
    opened.link.fail(PeerLostError("the follower is gone"))
    assert work.is_completed()
    assert not work.is_success()
    for _ in range(2):
        with pytest.raises(PeerLostError, match=r"^the follower is gone$"):
            work.wait()


def answered(table: Table, operation: str, keys: list[str], values: list[bytes]) -> list[Any]:
    answers: list[Any] = []
    table.run(Request(operation, keys, values), answers.append)
    return answers


@pytest.mark.parametrize(
    ("operation", "keys", "values", "error"),
    [
        ("jump", ["key"], [], ValueError),
        ("set", ["one", "two"], [b"1"], ValueError),
        ("add", ["text"], [b"1"], ValueError),
        ("add", ["count"], [], IndexError),
    ],
)
def test_a_bad_request_leaves_nothing_behind(
    operation: str, keys: list[str], values: list[bytes], error: type[Exception]
) -> None:
    table = Table()
    answered(table, "set", ["text"], [b"no number"])
    with pytest.raises(error):
        answered(table, operation, keys, values)
    assert answered(table, "add", ["count"], [b"2"]) == [[b"2"]]
    waiting = answered(table, "get", ["late"], [])
    assert waiting == []
    assert answered(table, "set", ["late"], [b"7"]) == [[]]
    assert waiting == [[b"7"]]
