"""Worker calls as bytes.

A call is what vLLM's executors call a collective RPC: a worker method's name (or a function), its arguments, and
whether an answer is wanted. The leader's token ledger rides along: 16 bytes before the pickle.
"""

from __future__ import annotations

import pickle
import struct
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle

from vllm_spark.errors import SparkError
from vllm_spark.executor.pickling import dumps_by_value

_LEDGER = struct.Struct("<Q8s")

EXECUTE, SAMPLE = "execute_model", "sample_tokens"

EXECUTE_AND_SAMPLE = "execute_model, then sample_tokens(None)"
"""Two calls in one message. The decode loop samples right after it executed unless the model's output is there
already, and with nothing to say about it unless an answer's form is prescribed: so the follower need not wait to be
told, and a step costs one message."""

LAST_CALL_OF_THE_START = "compile_or_warm_up_model"
"""Once it has returned on both ranks, the engine is up."""

STEP_METHODS = frozenset({EXECUTE, SAMPLE, "take_draft_token_ids"})
"""Calls of the decode loop: both ranks run them, only the leader's result is used (as vLLM's own
multiprocessing executor does), so the follower does not answer."""


class Call(NamedTuple):
    """One worker call: a method's name or a function that takes the worker, and its arguments."""

    method: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class RemoteError(SparkError):
    """A worker call failed on the follower; the message carries what it raised there."""


def encode_call(
    ledger: tuple[int, bytes], method: str | Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bytes:
    """The bytes of a call.

    Calls whose arguments a user may have made (all but the steps of requests that run already) are pickled by value:
    their functions and classes may be of a script, which the follower cannot import. It takes 16 us more.

    Raises:
        TypeError: the arguments cannot be pickled; the sentence says whose.
    """
    content = (method, args, kwargs)
    executes = method in (EXECUTE, EXECUTE_AND_SAMPLE)
    if executes or method in STEP_METHODS:
        new_requests = executes and args[0].scheduled_new_reqs
        dumps: Callable[[Any], bytes] = cloudpickle.dumps if new_requests else _dumps_fast
    else:
        dumps = dumps_by_value
    try:
        return _LEDGER.pack(*ledger) + dumps(content)
    except Exception as error:
        name = method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))
        raise TypeError(f"the call of {name} cannot be sent to the follower: {error}") from error


def _dumps_fast(content: Any) -> bytes:
    return pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)


def decode_ledger(payload: bytes) -> tuple[int, bytes]:
    """The leader's step and digest that came with a call; nothing is unpickled."""
    step, digest = _LEDGER.unpack_from(payload)
    return step, digest


def decode_call(payload: bytes) -> Call:
    """The call in `payload`, which must come from an authenticated peer.

    Raises:
        whatever unpickling raises: ImportError for a module that is on the leader alone, for example.
    """
    return Call(*pickle.loads(memoryview(payload)[_LEDGER.size :]))


def encode_result(result: Any) -> bytes:
    """The bytes of a successful reply; pickled by value, since a user's function may have made the result."""
    return dumps_by_value((True, result, ""))


def encode_error(error: BaseException) -> bytes:
    """The bytes of a failed reply."""
    details = "".join(traceback.format_exception(error))
    return pickle.dumps((False, f"{type(error).__name__}: {error}", details), protocol=pickle.HIGHEST_PROTOCOL)


def decode_reply(payload: bytes) -> Any:
    """The result in a reply.

    Raises:
        RemoteError: the call failed on the follower.
    """
    succeeded, result, details = pickle.loads(payload)
    if not succeeded:
        raise RemoteError(f"the follower's worker raised {result}\n{details}")
    return result
