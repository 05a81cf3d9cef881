"""LoRA adapters in requests: the check that both machines have the same files, and the client's error if not."""

from __future__ import annotations

import weakref
from http import HTTPStatus
from typing import Any

from vllm_spark.backend.support import adapter_refusal_in
from vllm_spark.config.settings import SECTION
from vllm_spark.errors import RefusedError
from vllm_spark.executor.rpc import COMPARE_ADAPTER

_compared: weakref.WeakKeyDictionary[Any, set[tuple[int, str]]] = weakref.WeakKeyDictionary()
"""By engine: ids and paths of adapters that were compared for requests."""


def compare_adapter(engine: Any, request: Any) -> None:
    """Compares the adapter of a request of `LLM` on both machines, before the request is added.

    In a step it is too late: a step cannot be refused, so the engine would end.

    Args:
        engine: vLLM's LLMEngine; nothing happens unless it runs on a pair.
        request: vLLM's LoRARequest, or None.

    Raises:
        RefusedError: the follower does not have it, or has it with other content.
        Exception: vLLM's own, for an adapter that does not exist.
    """
    if request is None or SECTION not in (engine.vllm_config.additional_config or {}):
        return
    known = _compared.setdefault(engine, set())
    key = (request.lora_int_id, request.lora_path)
    if key in known and not request.load_inplace:
        return
    try:
        # Its parts: vLLM's engine gets a LoRARequest in a call's arguments as a list.
        engine.collective_rpc(COMPARE_ADAPTER, args=(request.lora_name, request.lora_path, request.lora_int_id))
    except Exception as error:
        if sentence := adapter_refusal_in(str(error)):
            raise RefusedError(sentence) from None
        raise
    known.add(key)


def as_client_error(answer: Any) -> Any:
    """vLLM's answer to a request that loads an adapter, with status 400 if this project refused the adapter."""
    error = getattr(answer, "error", None)
    if error is not None and (sentence := adapter_refusal_in(str(error.message))):
        error.message, error.type, error.code = f"{sentence}.", "BadRequestError", HTTPStatus.BAD_REQUEST.value
    return answer
