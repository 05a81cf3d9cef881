"""LoRA adapters: both ranks load the same one, each from its own folder.

The leader compares an adapter with the follower's before a call or a step loads it, and each rank gets the folder that
was compared. Where vLLM's worker may load it again (it was evicted), the states of its files are looked at again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm_spark.backend.support import adapter_refusal
from vllm_spark.errors import RefusedError, SparkError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files.comparison import signature_of
from vllm_spark.executor.model_files.loaded import LoadedFiles, adapter_files
from vllm_spark.executor.model_files.own import find_own

ADD_LORA = "add_lora"

Signature = tuple[tuple[str, int, int, int], ...]
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
    """

    def __init__(self, ask: Callable[[LoadedFiles], str | None], loaded: Loaded) -> None:
        self._ask, self._loaded = ask, loaded
        self._compared: dict[str, _Compared] = {}

    def compare_request(self, request: Any) -> Any:
        """A LoRARequest that names the leader's folder, which both ranks have. Compares it now.

        Raises:
            RefusedError: the follower does not have it, or has another one.
            Exception: vLLM's own, for an adapter that is not there.
        """
        compared = self.compare(request.lora_name, str(request.lora_path), request.lora_int_id)
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
            in_memory = request.lora_int_id in loaded and not request.load_inplace
            if compared is None or not (in_memory or signature_of(compared.place) == compared.signature):
                new.lora_request = self.compare_request(request)
            else:
                new.lora_request = _with_path(request, compared.place)
        if self._compared and output.scheduled_cached_reqs.resumed_req_ids:
            loaded = self._loaded() if loaded is None else loaded
            for path, compared in list(self._compared.items()):
                if compared.adapter_id not in loaded and signature_of(compared.place) != compared.signature:
                    self.compare(compared.name, path, compared.adapter_id)


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


class _Own(NamedTuple):
    """Where this machine has an adapter, and what must be in it."""

    place: Path
    signature: Signature
    wanted: LoadedFiles
    adapter_id: int = 0


class FollowerAdapters:
    """The follower's side: finds its own folder for each adapter of the leader's.

    Args:
        loaded: asks this rank's worker.
        find: finds the folder of this machine that holds what the leader has; raises SparkError if there is none.
    """

    def __init__(self, loaded: Loaded, find: Callable[[LoadedFiles], Path] = find_own) -> None:
        self._loaded, self._find = loaded, find
        self._own: dict[str, _Own] = {}

    def compare(self, wanted: LoadedFiles) -> str | None:
        """Looks for what the leader has; None if it is here, else the sentence why not."""
        try:
            place = self._find(wanted)
        except SparkError as error:
            return str(error)
        # Taken before the last look at the content, which reads only what has changed meanwhile.
        signature = signature_of(place)
        try:
            difference = wanted.identity_at(place).difference(wanted.identity, f"on {host_name()}")
        except RefusedError as error:
            return str(error)
        if difference:
            return f"it was changed while it was compared: {difference} ({place}); load it again once it is complete"
        self._own[wanted.place] = _Own(place, signature, wanted)
        return None

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
                in_memory = new.lora_request.lora_int_id in loaded and not new.lora_request.load_inplace
                new.lora_request = self._place(new.lora_request, in_memory=in_memory)
        if self._own and output.scheduled_cached_reqs.resumed_req_ids:
            loaded = self._loaded() if loaded is None else loaded
            for path in self._evicted(loaded):
                self._verify(path)

    def _evicted(self, loaded: set[int]) -> Iterator[str]:
        yield from [path for path, own in self._own.items() if own.adapter_id and own.adapter_id not in loaded]

    def _place(self, request: Any, *, in_memory: bool) -> Any:
        path = str(request.lora_path)
        if path not in self._own:
            raise SparkError(f"the adapter {request.lora_name} was not compared before it is loaded; report this")
        self._own[path] = self._own[path]._replace(adapter_id=request.lora_int_id)
        if not in_memory:
            self._verify(path)
        return _with_path(request, self._own[path].place)

    def _verify(self, path: str) -> None:
        own = self._own[path]
        if (signature := signature_of(own.place)) == own.signature:
            return
        mine = own.wanted.identity_at(own.place)
        if difference := mine.difference(own.wanted.identity, f"on {host_name()}"):
            raise SparkError(
                f"the {own.wanted.what} was changed while the pair serves: {difference} ({own.place}); "
                "load a changed adapter from a new folder on both machines"
            )
        self._own[path] = own._replace(signature=signature)
