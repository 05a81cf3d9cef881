"""LoRA adapters: compared before they are loaded, each rank from its own folder, and at no cost in a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.backend.support import adapter_refusal, adapter_refusal_in
from vllm_spark.errors import RefusedError, SparkError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files import comparison
from vllm_spark.executor.model_files.adapters import FollowerAdapters, LeaderAdapters
from vllm_spark.executor.model_files.compared import ComparedFiles
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import find_own

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import SchedulerOutput


def make_adapter(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8}))
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


class Ranks:
    """Both sides, in one process and with the same files; `change` is called between their looks at them."""

    def __init__(self) -> None:
        self.loaded: set[int] = set()
        self.compared = 0
        self.change: Callable[[LoadedFiles], LoadedFiles] = lambda wanted: wanted
        self.files = ComparedFiles()
        self.leader = LeaderAdapters(self._compare, lambda: self.loaded, self._load)
        self.follower = FollowerAdapters(lambda: self.loaded, self.files)
        self.loads: list[str] = []

    def _compare(self, wanted: LoadedFiles) -> str | None:
        self.compared += 1
        return self.files.compare(self.change(wanted))

    def _load(self, request: LoRARequest) -> None:
        self.loads.append(self.follower.place(request).lora_path)
        self.loaded.add(request.lora_int_id)


@pytest.fixture
def ranks() -> Ranks:
    return Ranks()


def request(path: Path | str, number: int = 1, **more: Any) -> LoRARequest:
    return LoRARequest("sql", number, str(path), **more)


def step(*requests: LoRARequest, resumed: bool = False) -> SchedulerOutput:
    """A step that brings requests with those adapters."""
    output = SchedulerOutput.make_empty()
    new: Any = [SimpleNamespace(lora_request=each) for each in requests]
    output.scheduled_new_reqs = new
    if resumed:
        output.scheduled_cached_reqs.resumed_req_ids.add("an earlier one")
    return output


def test_an_adapter_is_compared_before_it_is_added(ranks: Ranks, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "sql")
    compared = ranks.leader.compare_request(request(adapter))
    assert ranks.follower.place(compared).lora_path == str(adapter)
    assert ranks.compared == 1
    ranks.leader.compare_request(request(adapter))
    assert ranks.compared == 2  # the follower's files may have changed


def test_a_relative_path_is_the_leaders(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make_adapter(tmp_path / "sql")
    monkeypatch.chdir(tmp_path)
    assert ranks.leader.compare_request(request("sql")).lora_path == str(adapter)


def test_an_adapter_with_other_content_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "sql")

    def after_the_leader_has_read(wanted: LoadedFiles) -> LoadedFiles:
        (adapter / "adapter_model.safetensors").write_bytes(b"another")
        return wanted

    ranks.change = after_the_leader_has_read
    with pytest.raises(RefusedError) as caught:
        ranks.leader.compare_request(request(adapter))
    assert str(caught.value) == (
        "the adapter sql cannot be loaded on both machines: the weight file adapter_model.safetensors has other "
        f"content on {host_name()} ({adapter}), compared with the leader; copy the leader's adapter sql to {adapter} "
        f"on {host_name()}"
    )


def test_an_adapter_that_is_nowhere_is_vllms_error(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(LoRAAdapterNotFoundError):
        ranks.leader.compare_request(request(tmp_path / "none"))
    assert ranks.compared == 0


def test_a_step_compares_what_it_has_not_seen(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program may hand an adapter to any request."""
    adapter = make_adapter(tmp_path / "sql")
    output = step(request(adapter))
    ranks.leader.compare_step(output)
    ranks.follower.place_step(output)
    assert ranks.compared == 1
    reads: list[Path] = []

    def digest(path: Path) -> str:
        reads.append(path)
        return ""

    monkeypatch.setattr(comparison, "file_digest", digest)
    ranks.loaded = {1}
    for _ in range(3):
        output = step(request(adapter))
        ranks.leader.compare_step(output)
        ranks.follower.place_step(output)
    assert ranks.compared == 1
    assert not reads


def test_what_is_in_memory_may_change_on_disk(ranks: Ranks, tmp_path: Path) -> None:
    """It is compared again when it is loaded again."""
    adapter = make_adapter(tmp_path / "sql")
    output = step(request(adapter))
    ranks.leader.compare_step(output)
    ranks.follower.place_step(output)
    ranks.loaded = {1}
    (adapter / "adapter_model.safetensors").write_bytes(b"newer")
    output = step(request(adapter))
    ranks.leader.compare_step(output)
    ranks.follower.place_step(output)
    assert ranks.compared == 1
    ranks.loaded = set()
    output = step(request(adapter), resumed=True)
    ranks.leader.compare_step(output)
    ranks.follower.place_step(output)
    assert ranks.compared == 2


@pytest.mark.parametrize("resumed", [False, True], ids=["new request", "resumed request"])
def test_the_follower_notices_that_its_own_copy_has_changed(ranks: Ranks, tmp_path: Path, resumed: bool) -> None:
    """Only there, where the leader does not see it."""
    adapter = make_adapter(tmp_path / "sql")
    output = step(request(adapter))
    ranks.leader.compare_step(output)
    ranks.follower.place_step(output)
    (adapter / "adapter_model.safetensors").write_bytes(b"newer")
    output = step(resumed=True) if resumed else step(request(adapter))
    with pytest.raises(SparkError, match=r"^the adapter sql was changed while the pair serves: the weight file .* has"):
        ranks.follower.place_step(output)


def test_a_folder_that_changes_while_it_is_compared(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its content was read: what is loaded must be what was compared."""
    adapter = make_adapter(tmp_path / "sql")

    def find_and_change(wanted: LoadedFiles) -> Path:
        place = find_own(wanted)
        (place / "adapter_model.safetensors").write_bytes(b"newer")
        return place

    monkeypatch.setattr(ranks.files, "_find", find_and_change)
    with pytest.raises(RefusedError, match=r"it was changed while it was compared: the weight file adapter_model"):
        ranks.leader.compare_request(request(adapter))


def test_the_same_files_written_anew_are_the_same_adapter(ranks: Ranks, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "sql")
    compared = ranks.leader.compare_request(request(adapter))
    shutil.rmtree(adapter)
    make_adapter(adapter)
    assert ranks.follower.place(compared).lora_path == str(adapter)


def test_loading_in_place_looks_at_the_files(ranks: Ranks, tmp_path: Path) -> None:
    """Before a step and once: a worker would read them again in each step of that request."""
    adapter = make_adapter(tmp_path / "sql")
    ranks.leader.compare_step(step(request(adapter)))
    ranks.loaded = {1}
    (adapter / "adapter_model.safetensors").write_bytes(b"newer")
    for _ in range(2):
        output = step(request(adapter, load_inplace=True))
        ranks.leader.compare_step(output)
        ranks.follower.place_step(output)
        (new,) = output.scheduled_new_reqs
        assert not new.lora_request.load_inplace
        assert ranks.compared == 2
        assert ranks.loads == [str(adapter)]


def test_loading_in_place_loads_what_another_folder_has(ranks: Ranks, tmp_path: Path) -> None:
    """Under one id: what was loaded last is in memory, whatever is on disk."""
    first, second = make_adapter(tmp_path / "first"), make_adapter(tmp_path / "second", b"another")
    ranks.loaded = {1}
    for adapter in (first, second):
        ranks._load(ranks.leader.compare_request(request(adapter, load_inplace=True)))
    ranks.leader.compare_step(step(request(second, load_inplace=True)))
    assert ranks.loads == [str(first), str(second)]
    ranks.leader.compare_step(step(request(first, load_inplace=True)))
    assert ranks.loads == [str(first), str(second), str(first)]


def test_the_sentence_is_found_in_what_vllm_makes_of_it() -> None:
    sentence = adapter_refusal("sql", "it differs; copy it")
    assert adapter_refusal_in(f"Call to add_lora method failed: {sentence}.") == sentence
    assert adapter_refusal_in("Call to add_lora method failed: LoRA rank 64 is greater than max_lora_rank 16.") is None
