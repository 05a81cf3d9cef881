"""LoRA adapters: both ranks load the same one, each from its own folder.

The leader compares an adapter with the follower's before a call or a step loads it, and each rank gets the folder that
was compared. Where vLLM's worker may load it again (it was evicted), the states of its files are looked at again.

vLLM keeps `load_inplace` in each request with such an adapter, and its worker then reads the files in every step. If
the files change meanwhile, the leader's worker would read others than the follower's. So a step never loads in place: a
call before it does, on both ranks, and only if the files are not those in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vllm_spark.backend.support import adapter_refusal
from vllm_spark.errors import RefusedError
from vllm_spark.executor.model_files.compared import ComparedFiles
from vllm_spark.executor.model_files.comparison import Signature, signature_of
from vllm_spark.executor.model_files.loaded import LoadedFiles, adapter_files

ADD_LORA = "add_lora"

Loaded = Callable[[], set[int]]
"""Asks a worker for the ids of the adapters that it holds in memory."""


class _Compared(NamedTuple):
    """A folder of the leader's whose content both ranks have."""

    name: str
    place: Path
    signature: Signature
    adapter_id: int


class LeaderAdapters:
    """The leader's side.

    Args:
        ask: asks the follower for the same files; returns None, or the sentence why it does not have them.
        loaded: asks this rank's worker.
        load: has both ranks' workers load the adapter of a LoRARequest that was compared.
    """

    def __init__(self, ask: Callable[[LoadedFiles], str | None], loaded: Loaded, load: Callable[[Any], object]) -> None:
        self._ask, self._loaded, self._load = ask, loaded, load
        self._compared: dict[str, _Compared] = {}
        self._in_memory: dict[int, _Compared] = {}  # by id, what was loaded last

    def compare_request(self, request: Any) -> Any:
        """A LoRARequest that names the leader's folder, which both ranks have. Compares it now.

        Raises:
            RefusedError: the follower does not have it, or has another one.
            Exception: vLLM's own, for an adapter that is not there.
        """
        compared = self.compare(request.lora_name, str(request.lora_path), request.lora_int_id)
        self._in_memory[request.lora_int_id] = compared
        return _with_path(request, compared.place)

    def compare(self, name: str, path: str, adapter_id: int) -> _Compared:
        """Has the follower look for the adapter, whatever was compared before. `path` is as in a LoRARequest.

        Raises:
            RefusedError, Exception: as `compare_request`.
        """
        place = _find_adapter(name, path)
        signature = signature_of(place)  # before it is read: a change in between is noticed
        if refusal := self._ask(adapter_files(name, path, place)):
            raise RefusedError(adapter_refusal(name, refusal))
        self._compared[path] = compared = _Compared(name, place, signature, adapter_id)
        return compared

    def compare_step(self, output: Any) -> None:
        """Compares the adapters that a step may load. vLLM's SchedulerOutput is changed in place.

        What was compared before and has the same files, or is in memory, costs a few microseconds.

        Raises:
            RefusedError, Exception: as `compare_request`.
        """
        loaded: set[int] | None = None
        for new in output.scheduled_new_reqs:
            request = new.lora_request
            if request is None:
                continue
            loaded = self._loaded() if loaded is None else loaded
            compared = self._compared.get(str(request.lora_path))
            in_memory = request.lora_int_id in loaded
            if request.load_inplace:
                if not (in_memory and self._in_memory.get(request.lora_int_id) == compared and _is_unchanged(compared)):
                    self._load(self.compare_request(request))
                new.lora_request = _with_path(request, self._compared[str(request.lora_path)].place)
                new.lora_request.load_inplace = False
            elif compared is None or not (in_memory or _is_unchanged(compared)):
                new.lora_request = self.compare_request(request)
            else:
                new.lora_request = _with_path(request, compared.place)
        if self._compared and output.scheduled_cached_reqs.resumed_req_ids:
            loaded = self._loaded() if loaded is None else loaded
            for path, compared in list(self._compared.items()):
                if compared.adapter_id not in loaded and not _is_unchanged(compared):
                    self.compare(compared.name, path, compared.adapter_id)


def _is_unchanged(compared: _Compared | None) -> bool:
    return compared is not None and signature_of(compared.place) == compared.signature


def _with_path(request: Any, place: Path) -> Any:
    """A copy of vLLM's LoRARequest that names another folder."""
    changed = copy.copy(request)
    changed.lora_path = str(place)
    return changed


def _find_adapter(name: str, path: str) -> Path:
    """Where vLLM's worker would load it from on this machine; downloaded, as by vLLM, if it is a name of the hub."""
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.utils import get_adapter_absolute_path

    try:
        place = Path(get_adapter_absolute_path(path))
    except FileNotFoundError as error:
        raise LoRAAdapterNotFoundError(name, path) from error
    if not place.is_dir():
        raise LoRAAdapterNotFoundError(name, path)
    return place


class FollowerAdapters:
    """The follower's side: puts its own folder for each adapter of the leader's into calls and steps.

    Args:
        loaded: asks this rank's worker.
        compared: this machine's folders.
    """

    def __init__(self, loaded: Loaded, compared: ComparedFiles) -> None:
        self._loaded, self._compared = loaded, compared
        self._ids: dict[str, int] = {}  # by the leader's folder

    def place(self, request: Any) -> Any:
        """The LoRARequest with this machine's folder, which a worker is about to load.

        Raises:
            SparkError: the folder's content is another one than what was compared.
        """
        return self._place(request, in_memory=False)

    def place_step(self, output: Any) -> None:
        """Puts this machine's folders into a step. vLLM's SchedulerOutput is changed in place.

        Raises:
            SparkError: as `place`, for an adapter that the step would load.
        """
        loaded: set[int] | None = None
        for new in output.scheduled_new_reqs:
            if new.lora_request is not None:
                loaded = self._loaded() if loaded is None else loaded
                new.lora_request = self._place(new.lora_request, in_memory=new.lora_request.lora_int_id in loaded)
        if self._ids and output.scheduled_cached_reqs.resumed_req_ids:
            loaded = self._loaded() if loaded is None else loaded
            for path, adapter_id in self._ids.items():
                if adapter_id not in loaded:  # it was evicted
                    self._compared.verify(path)

    def _place(self, request: Any, *, in_memory: bool) -> Any:
        path = str(request.lora_path)
        place = self._compared.place(path, f"adapter {request.lora_name}")
        self._ids[path] = request.lora_int_id
        if not in_memory:
            self._compared.verify(path)
        return _with_path(request, place)
