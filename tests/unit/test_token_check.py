"""The ranks' digests, and generators that nobody else advances."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spark.executor.token_check import DriftError, TokenDigest, WorkerRandomState

Step = list[list[int]]
steps = st.lists(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=12
)


def output(tokens: Step) -> Any:
    return SimpleNamespace(req_ids=[f"r{i}" for i in range(len(tokens))], sampled_token_ids=tokens)


@given(steps)
def test_same_steps_same_digest(history: list[Step]) -> None:
    mine, theirs = TokenDigest(), TokenDigest()
    for step in history:
        mine.update(output(step))
        theirs.update(output([list(tokens) for tokens in step]))
        mine.compare(*theirs.state())
    assert mine.state() == theirs.state()
    assert mine.state()[0] == len(history)


@given(steps, st.data())
def test_any_difference_is_found_at_that_very_step(history: list[Step], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(history) - 1))
    other = [[list(tokens) for tokens in step] for step in history]
    other[at][0][0] += 1
    theirs = TokenDigest()
    states = []
    for step in other:
        theirs.update(output(step))
        states.append(theirs.state())
    mine = TokenDigest()
    for number, step in enumerate(history):
        mine.update(output(step))
        if number < at:
            mine.compare(*states[number])
            continue
        with pytest.raises(DriftError, match=f"at step {at + 1} "):
            mine.compare(*states[number])
        break


def drafts(tokens: Step) -> Any:
    return SimpleNamespace(req_ids=[f"r{i}" for i in range(len(tokens))], draft_token_ids=tokens)


def test_drafts_are_compared_together_with_the_step_that_verifies_them() -> None:
    mine, theirs = TokenDigest(), TokenDigest()
    for rank, drafted in ((mine, 3), (theirs, 4)):
        rank.update(output([[1]]))
        rank.update(drafts([[2, drafted]]))
    mine.compare(*theirs.state())
    assert mine.state()[0] == 1, "drafts are not a step"
    for rank in (mine, theirs):
        rank.update(output([[2]]))
    with pytest.raises(DriftError, match=r"^the ranks drafted different tokens for step 2 \(digest .*start vllm serve"):
        mine.compare(*theirs.state())


def test_accepted_drafts_are_sampled_tokens() -> None:
    mine, theirs = TokenDigest(), TokenDigest()
    for rank, accepted in ((mine, [[5, 6]]), (theirs, [[5]])):
        rank.update(drafts([[5, 6]]))
        rank.update(output(accepted))
    with pytest.raises(DriftError, match=r"^the ranks sampled different tokens at step 1 "):
        mine.compare(*theirs.state())


def test_the_peers_digest_may_come_first() -> None:
    theirs = TokenDigest()
    theirs.update(output([[1]]))
    mine = TokenDigest()
    mine.compare(*theirs.state())
    with pytest.raises(DriftError, match=r"start vllm serve again .*vllm-spark doctor --peer, .* report"):
        mine.update(output([[2]]))


def test_steps_without_tokens_do_not_count() -> None:
    token_digest = TokenDigest()
    token_digest.update(output([]))
    token_digest.update(SimpleNamespace(pooler_output=[1]))
    assert token_digest.state() == (0, bytes(8))
    token_digest.compare(0, b"whatever")


def test_history_is_bounded() -> None:
    token_digest = TokenDigest()
    for _ in range(10_000):
        token_digest.update(output([[1]]))
    assert len(token_digest._mine) <= 4096


def test_token_digest_is_safe_between_threads() -> None:
    mine, theirs = TokenDigest(), TokenDigest()
    states = []
    for number in range(2000):
        theirs.update(output([[number]]))
        states.append(theirs.state())
    errors: list[Exception] = []

    def compare() -> None:
        try:
            for state in states:
                mine.compare(*state)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=compare)
    thread.start()
    for number in range(2000):
        mine.update(output([[number]]))
    thread.join(30)
    assert errors == []


def draws(state: WorkerRandomState, disturb: bool) -> list[float]:
    import numpy
    import torch

    values = []
    for number in range(5):
        with state:
            values += [torch.rand(1).item(), float(numpy.random.random())]
            if number == 2:
                torch.manual_seed(5)
                numpy.random.seed(5)
        if disturb:
            torch.rand(number + 1)
            numpy.random.random(number + 3)
            torch.manual_seed(99)
            numpy.random.seed(99)
    return values


def test_draws_outside_do_not_change_those_inside() -> None:
    import numpy
    import torch

    torch.manual_seed(1)
    numpy.random.seed(1)
    undisturbed = draws(WorkerRandomState(), disturb=False)
    torch.manual_seed(1)
    numpy.random.seed(1)
    assert draws(WorkerRandomState(), disturb=True) == undisturbed


def test_an_error_inside_leaves_the_outer_generators_in_force() -> None:
    import torch

    state = WorkerRandomState()
    torch.manual_seed(3)
    expected = torch.rand(1).item()
    torch.manual_seed(3)
    with pytest.raises(ZeroDivisionError), state:
        _ = torch.rand(100).sum().item() and 1 / 0
    assert torch.rand(1).item() == expected
