"""How a search decides, and what a kernel that does not end costs."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_spark.errors import SparkError
from vllm_spark.kernels.devices import GB10
from vllm_spark.tune import search, timing
from vllm_spark.tune.journal import Journal
from vllm_spark.tune.marlin import search as marlin_search
from vllm_spark.tune.results import (
    MARLIN_DEFAULT,
)
from vllm_spark.tune.timing import HangError, Times, route
from vllm_spark.tune.tuner import tune as run_tuner

from .tuning_outcomes import (
    ROW,
    VERSIONS,
    W13,
)


@dataclasses.dataclass(frozen=True)
class Timed:
    """A problem whose calls take known times."""

    cost: Mapping[str | None, float]
    rounds: list[tuple[list[str | None], int]] = dataclasses.field(default_factory=list)

    def run(self, parameters: str | None) -> None:
        raise AssertionError("its times are known")

    def call(self, call: int, parameters: str | None) -> torch.Tensor:
        raise AssertionError("its times are known")


@pytest.fixture
def known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def race(problem: Timed, candidates: list[str | None], rounds: int) -> Times[str | None]:
        problem.rounds.append((list(candidates), rounds))
        return Times({each: [problem.cost[each]] * rounds for each in candidates})

    monkeypatch.setattr(search, "_measure", race)


@pytest.mark.usefixtures("known_times")
def test_a_winner_wins_with_other_routings_too() -> None:
    first = Timed({None: 10.0, "a": 9.0, "b": 8.0})
    found = search.find(first, Timed({None: 10.0, "b": 9.0}), None, ["a", "b"], 10)
    assert (found.parameters, found.default_us, found.tuned_us, found.ratio) == ("b", 10.0, 9.0, 0.9)
    assert found.tried == {"a": 0.9, "b": 0.8}
    lucky = search.find(first, Timed({None: 10.0, "b": 9.9}), None, ["a", "b"], 10)
    assert (lucky.parameters, lucky.tuned_us, lucky.ratio) == (None, 10.0, 1.0)


@pytest.mark.usefixtures("known_times")
def test_without_a_clear_winner_or_any_candidate_the_default_stays() -> None:
    found = search.find(Timed({None: 10.0, "a": 9.85}), Timed({None: 10.0, "a": 5.0}), None, ["a"], 10)
    assert found.parameters is None
    found = search.find(Timed({None: 10.0}), Timed({None: 10.0}), None, [], 10)
    assert (found.parameters, found.tried) == (None, {})


@pytest.mark.usefixtures("known_times")
def test_of_many_the_slow_are_measured_in_few_rounds_alone() -> None:
    names = [f"{number:02}" for number in range(40)]
    cost: dict[str | None, float] = {None: 10.0} | {name: 8.0 + 0.1 * number for number, name in enumerate(names)}
    problem = Timed(cost)
    found = search.find(problem, Timed(cost), None, names, 20)
    (all_of_them, few), (rest, many) = problem.rounds
    assert set(all_of_them) == {None, *names}
    assert (few < many, many) == (True, 20)
    assert rest == [None, *names[:21]], "within 1.25 of the fastest"
    assert set(found.tried) == set(names)
    assert found.parameters == "00"


class Event:
    """Of a stream whose kernels are done when `done` says so."""

    done = False

    def record(self) -> None: ...

    def query(self) -> bool:
        return self.done


@dataclasses.dataclass(frozen=True)
class Ready:
    """A problem whose kernels are enqueued, and then do what the test says."""

    error: Exception | None = None

    def run(self, parameters: object) -> None:
        if self.error is not None:
            raise self.error

    def call(self, call: int, parameters: object) -> torch.Tensor:
        return torch.empty(0)


def test_a_kernel_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait() -> None:
        raise AssertionError("that would wait without end")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "empty_cache", wait)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=10))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 100))
    monkeypatch.setattr(timing, "MAX_KERNEL_SECONDS", 0.02)
    why = r"did not end within 0\.02 s, with 'these'"
    with pytest.raises(HangError, match=why) as caught, search.cold_layers(str, 1, 10, "small experts"):
        search.runs(Ready(), "these", "Marlin")
    assert caught.value.parameters == "these"
    monkeypatch.setattr(Event, "done", True)
    assert search.runs(Ready(), "these", "Marlin")


class EndlessWait(Exception):
    """What waits for the GPU without a bound."""


def endless_wait() -> None:
    raise EndlessWait


class Stream:
    """What replays of a GPU's graphs put on it, in their order; it stops for good at the first that hangs."""

    def __init__(self) -> None:
        self.hung = False

    def event(self, enable_timing: bool = False) -> SimpleNamespace:
        event = SimpleNamespace(comes=False)

        def record() -> None:
            event.comes = not self.hung

        event.record, event.query, event.elapsed_time = record, lambda: event.comes, lambda end: 1.0
        return event

    def captured(self, name: str, body: Callable[[], None]) -> SimpleNamespace:
        replays = 0

        def replay() -> None:
            nonlocal replays
            replays += 1
            self.hung |= (name, replays) == ("the second", 2)

        return SimpleNamespace(replay=replay)


def test_a_kernel_that_hangs_in_a_race_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended when it was tried, and does not in a later round; those after it on the stream do not come either."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", endless_wait)
    monkeypatch.setattr(timing, "_captured", stream.captured)
    monkeypatch.setattr(timing, "MAX_KERNEL_SECONDS", 0.02)
    names = ["the first", "the second", "the third"]
    with pytest.raises(HangError) as caught:
        timing.time_in_turns({name: lambda: None for name in names}, 1, 3)
    assert caught.value.parameters == "the second"


def test_a_kernel_that_hangs_after_its_call_failed_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", endless_wait)
    monkeypatch.setattr(timing, "MAX_KERNEL_SECONDS", 0.02)
    refused = SimpleNamespace(call=lambda call, parameters: 1 / 0)
    with pytest.raises(HangError) as caught:
        search.runs(refused, "these", "Marlin")
    assert caught.value.parameters == "these"
    monkeypatch.setattr(Event, "done", True)
    assert not search.runs(refused, "these", "Marlin")


@pytest.mark.parametrize(("ends", "error"), [(True, KeyboardInterrupt), (False, HangError)])
def test_ctrl_c_counts_when_the_kernel_is_done(
    ends: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sleep(seconds: float) -> None:
        monkeypatch.setattr(Event, "done", ends)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "MAX_KERNEL_SECONDS", 0.02)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(error):
        timing.wait_for_kernels("these")


def test_ctrl_c_in_a_race_counts_when_all_its_kernels_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its way out the process frees memory, which waits for what still runs."""
    waiting: list[SimpleNamespace] = []

    def event(enable_timing: bool = False) -> SimpleNamespace:
        new = SimpleNamespace(done=False, record=lambda: None)
        new.query = lambda: new.done
        waiting.append(new)
        return new

    def sleep(seconds: float) -> None:
        next(each for each in waiting if not each.done).done = True
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(timing, "_captured", lambda name, body: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        timing.time_in_turns({name: lambda: None for name in "abcd"}, 1, 3)
    ends = waiting[1::2]
    assert len(ends) == 4
    assert all(each.done for each in ends)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (torch.cuda.OutOfMemoryError("Tried to allocate\n2 GiB"), "^the GPU has no memory left for the search"),
        (RuntimeError("\n CUDA error: misaligned\nmore"), "not in its first call: CUDA error: misaligned$"),
    ],
)
def test_a_kernel_that_fails_while_it_is_timed_costs_a_sentence(
    error: Exception, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "time_in_turns", lambda bodies, calls, rounds: [body() for body in bodies.values()])
    with pytest.raises(SparkError, match=why):
        search.find(Ready(error), Ready(error), None, ["a"], 2)


def test_a_search_goes_on_without_what_hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = marlin_search.search_space(W13, GB10)
    raced: list[Any] = []

    def runs(problem: Any, parameters: Any, kernel: str) -> bool:
        if parameters == space[1]:
            raise HangError(parameters)
        return True

    def find(problem: Any, others: Any, default: Any, candidates: list[Any], rounds: int) -> search.Found[Any]:
        raced.extend(candidates)
        return search.Found(default, 1.0, 1.0, 1.0, {})

    monkeypatch.setattr(marlin_search, "runs", runs)
    monkeypatch.setattr(marlin_search, "find", find)
    monkeypatch.setattr(marlin_search, "MarlinProblem", lambda *given, seed: None)
    monkeypatch.setattr(marlin_search, "weights_of", lambda shape, on_note: contextlib.nullcontext([]))
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    with pytest.raises(HangError):
        run_tuner([W13], (1,), GB10, journal, lambda outcome: None)
    assert journal.hung() == {space[1]}
    assert len(run_tuner([W13], (1,), GB10, journal, lambda outcome: None)) == 1
    assert raced == [each for each in space if each != space[1]]


def test_vllms_own_choice_is_not_left_out_when_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is compared with it."""

    def find(*given: Any) -> None:
        raise HangError(MARLIN_DEFAULT)

    monkeypatch.setattr(marlin_search, "runs", lambda *given: True)
    monkeypatch.setattr(marlin_search, "find", find)
    monkeypatch.setattr(marlin_search, "MarlinProblem", lambda *given, seed: None)
    monkeypatch.setattr(marlin_search, "weights_of", lambda shape, on_note: contextlib.nullcontext([]))
    journal = Journal(tmp_path, GB10.name, VERSIONS)
    with pytest.raises(HangError):
        run_tuner([W13], (1,), GB10, journal, lambda outcome: None)
    assert journal.hung() == set()


@pytest.mark.parametrize(
    ("parameters", "further"),
    [
        ("'this tile'", "it is recorded in {folder}, and the same command continues without it."),
        ("None", "that is vLLM's own choice, and without it there is nothing to compare with"),
    ],
)
def test_a_process_whose_gpu_is_stuck_ends_at_once(tmp_path: Path, parameters: str, further: str) -> None:
    program = """
import atexit, sys, time
from pathlib import Path
from vllm_spark.cli.tune import _exit_at_once
from vllm_spark.tune.timing import HangError
atexit.register(time.sleep, 500)
print("before", flush=False)
_exit_at_once(HangError(PARAMETERS), Path(sys.argv[1]))
""".replace("PARAMETERS", parameters)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (1, "before\n")
    assert f"with {parameters}; {further.format(folder=tmp_path)}" in done.stderr


def test_vllms_override_ends_when_a_kernel_fails() -> None:
    vllm = pytest.importorskip("vllm.model_executor.layers.fused_moe")
    from vllm_spark.tune.fused_moe.problem import _overriding

    inside = []

    def fail() -> None:
        with _overriding(ROW.row()):
            inside.append(vllm.get_config())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert inside == [ROW.row()]
    assert vllm.get_config() is None
    with _overriding(ROW.row()):
        pass
    assert vllm.get_config() is None


@pytest.mark.parametrize(("free", "expected"), [(100, 3), (99, 3), (3, 2)])
def test_a_gpu_with_little_room_is_noted(monkeypatch: pytest.MonkeyPatch, free: int, expected: int) -> None:
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=10))
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (free, 100))
    notes: list[str] = []
    with search.cold_layers(str, 1, 10, "small experts", notes.append) as layers:
        assert len(layers) == expected
    assert [("only 2 of 3 layers of small experts" in note) for note in notes] == [True] * (expected < 3)


def test_routing_is_skewed_and_the_same_everywhere() -> None:
    weights, chosen = route(4096, 128, 8, seed=3)
    assert torch.equal(chosen, route(4096, 128, 8, seed=3)[1])
    assert all(len(set(token.tolist())) == 8 for token in chosen[:64])
    assert torch.allclose(weights.sum(dim=1), torch.ones(4096))
    counts = torch.bincount(chosen.flatten(), minlength=128).sort(descending=True).values
    assert counts[:26].sum() > 0.35 * counts.sum(), "a fifth of the experts gets far more than a fifth"
