"""Process groups of torch over the pair's connection: real processes, real TLS, compared with gloo."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import Any

import pytest

from vllm_spark.processes.local import free_ports

from . import group_ranks

BOUND = 90.0


def run(function: str, killed: bool = False) -> tuple[Any, Any]:
    """What both ranks return; of a rank that kills itself None."""
    (port,) = free_ports(1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "vllm_spark.collective"])  # once: it takes seconds
    ranks = []
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=group_ranks.report, args=(theirs, function, rank, port), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        answers = [_answer(ours) for _, ours in ranks]
        for process, _ in ranks:
            process.join(BOUND)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
    for rank, (process, _) in enumerate(ranks):
        assert process.exitcode == (-signal.SIGKILL if killed and rank == 1 else 0), f"rank {rank}: see its output"
    return answers[0], answers[1]


def _answer(ours: Connection) -> Any:
    assert ours.poll(BOUND), "a rank hangs"
    try:
        return ours.recv()
    except EOFError:  # it has killed itself, or failed
        return None


def test_every_operation_gives_what_gloo_gives() -> None:
    first, second = run("same_as_gloo")
    assert first["compared"] > 200
    assert second["compared"] > 200


def test_groups_of_one_rank() -> None:
    for answer in run("alone"):
        assert answer == {"objects": ["x"], "size": 1, "rank": 0}


def test_both_send_more_than_a_socket_holds() -> None:
    for answer in run("both_send_much"):
        assert answer == {"values": [3.0]}


def test_groups_in_threads_do_not_mix() -> None:
    expected = [sum(2 * index + number for number in range(100)) for index in range(4)]
    for answer in run("threads"):
        assert answer == {"sums": expected}


def test_the_store() -> None:
    answers = run("store")
    for answer in answers:
        assert answer["seen"] == [0, 255]
        assert answer["count"] == 100
        assert answer["check"] == [True, False]
        assert answer["late"] == "yes"
        assert answer["both"] == ["0", "1"]
        assert answer["multi"] == ["1", "1"]
        assert answer["deleted"] == [True, False]
        assert "DistStoreError: the pair's store has no answer to wait" in answer["waited"]
    assert answers[1]["swapped"] == "yes"


def test_a_rank_that_does_not_come_is_named() -> None:
    error = run("late")[0]["error"]
    assert error == (
        "PeerTimeoutError: the other rank (rank 1) did not call barrier, operation 0 of process group 0, within 1 s"
    )


def test_different_operations_are_named() -> None:
    errors = [answer["errors"] for answer in run("different")]
    assert "operation 0 of process group 0 is all_reduce (sum) here and barrier on the other" in errors[0][0]
    assert "is barrier here and all_reduce (sum) on the other" in errors[1][0]
    assert "all_reduce (sum) in process group 0 moves 12 bytes here and 16 on the other rank" in errors[0][1]


def test_an_operation_ends_once() -> None:
    """As torch's own: it may be waited for again, and once it is completed its outcome is there."""
    answer = run("waited_for_again")[0]
    late = "PeerTimeoutError: the other rank (rank 1) did not call send, operation 0 of process group 0, within 1 s"
    assert answer == {
        "before": [False, False, False],
        "waits": [True, True],
        "waited": [7.0, 7.0],
        "seen": [8.0, 8.0],
        "errors": [late, late],
        "completed": [True, True, True],
        "succeeded": [True, True, False],
    }


def test_nobody_waits_for_a_rank_that_is_dead() -> None:
    answer = run("left_alone", killed=True)[0]
    assert len(answer["errors"]) == 3
    for error in answer["errors"]:
        assert error.startswith("ConnectionClosedError: ")
        assert "rank 1" in error
    assert answer["seconds"] < 60  # of the 1800 that the group was given


def test_closing_ends_every_wait() -> None:
    mine, theirs = run("closed")
    assert mine["errors"] == ["PeerLostError: the test is over"]
    assert not mine["alive"]
    assert "spark-groups" not in mine["threads"]
    assert "closed the connection" in theirs["error"]


def test_what_connects_by_itself_is_bounded() -> None:
    """NCCL waits for ever for a port that a firewall keeps closed, where nothing can interrupt it."""
    for answer in run("stuck"):
        assert answer["in time"] == 0
        (sentence,) = answer["errors"]
        assert sentence.startswith("NCCL did not connect to the other rank within 0.2 s; ")
        assert "firewall" in sentence
        assert answer["threads"] == 2  # this one and the link's


@pytest.mark.parametrize("device", ["meta"])
def test_only_tensors_of_the_cpu(device: str) -> None:
    import torch

    from vllm_spark.backend.process_group import _bytes_of
    from vllm_spark.errors import SparkError

    with pytest.raises(SparkError, match=f"a tensor on {device} was given to a process group for the CPU"):
        _bytes_of([torch.empty(1, device=device)])
