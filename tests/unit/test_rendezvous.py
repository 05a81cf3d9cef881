"""What two ranks say when they do not come together."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator

import pytest

from vllm_spark.collective import AgreementError, CollectiveError, SocketPeer
from vllm_spark.collective.rendezvous import Terms, agree
from vllm_spark.records import to_json

TERMS = Terms(rank=1, world_size=2, description="", agreement={})
REMEDY = "see the output of its program, and start both again"


@pytest.mark.parametrize("rank", [1, 2])
def test_each_rank_is_called_by_its_number(rank: int) -> None:
    """Two that are alike, and two of which one is none of a pair."""
    theirs = to_json(dataclasses.replace(TERMS, rank=rank))
    with pytest.raises(AgreementError) as caught:
        agree(lambda mine: theirs, TERMS)
    assert str(caught.value) == (
        f"this process is rank 1, and the peer is rank {rank}; one must be rank 0, the other rank 1"
    )


def test_a_message_of_another_kind() -> None:
    with pytest.raises(
        CollectiveError, match=r"^the peer's Terms message could not be read \(.*\); run the same version"
    ):
        agree(lambda mine: b"[]", TERMS)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


def test_a_peer_that_does_not_answer(ends: tuple[socket.socket, socket.socket]) -> None:
    peer = SocketPeer(ends[0], timeout=0.5)
    with pytest.raises(CollectiveError) as caught:
        peer.exchange(b"")
    assert str(caught.value) == (
        "the peer did not answer within 0.5 s; check whether its program still runs, and start both again"
    )
    peer.close()


def test_a_peer_that_is_gone(ends: tuple[socket.socket, socket.socket]) -> None:
    peer = SocketPeer(ends[0])
    ends[1].shutdown(socket.SHUT_WR)
    with pytest.raises(CollectiveError) as caught:
        peer.exchange(b"")
    assert str(caught.value) == f"the peer closed its connection; {REMEDY}"
    ends[1].close()
    with pytest.raises(CollectiveError) as caught:
        peer.exchange(b"")
    assert str(caught.value) == f"the peer cannot be reached any more (Broken pipe); {REMEDY}"
    peer.close()
