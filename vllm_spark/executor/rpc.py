"""Encodes and decodes worker calls (vLLM's collective RPCs) and their replies.

A call is a worker method's name (or a function) and its arguments, pickled, after a header of 24 bytes: the leader's
step and token digest, and the call's number, which its reply repeats. Calls of the decode loop, which have no reply,
have the number 0.
"""

from __future__ import annotations

import pickle
import struct
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle

from vllm_spark.errors import SparkError, described
from vllm_spark.executor.pickling import dumps_by_value

_HEADER = struct.Struct("<Q8sQ")
_NUMBER = struct.Struct("<Q")

EXECUTE, SAMPLE = "execute_model", "sample_tokens"

EXECUTE_THEN_SAMPLE = "execute_model, then sample_tokens(None)"
"""Two calls in one message: vLLM samples right after `execute_model` unless that returned an output, and without
arguments unless the request has structured output. So a step costs one message."""

WARM_UP = "compile_or_warm_up_model"
"""vLLM's last call of a start: once it has returned on both ranks, the engine is up."""

COMPARE_ADAPTER = "compare adapter"
"""Not a method of the worker: the leader compares an adapter with the follower's, and nothing is loaded."""

COMPARE_FILES = "compare files"
"""Not a method of the worker: the follower searches for the files of its argument, and replies None or the sentence why
it does not have them."""

DESCRIBE = "describe rank"
"""Not a method of the worker: the follower replies with the JSON of its `RankReport`."""

RELOAD_WEIGHTS = "reload_weights"

WEIGHT_METHODS = frozenset(
    {RELOAD_WEIGHTS, "start_weight_update", "start_draft_weight_update", "update_weights", "finish_weight_update"}
)
"""Calls that replace weights while the pair serves. If one fails on one rank alone, the ranks' weights may differ."""

TRACE = "trace"
"""Not a method of the worker: an API server asks the leader's engine to record steps, or for what was recorded."""

TRACE_CLOCK, TRACE_START, TRACE_RESULT = "compare clocks", "start a trace", "result of a trace"
TRACE_METHODS = frozenset({TRACE_CLOCK, TRACE_START, TRACE_RESULT})
"""Not methods of the worker: the follower answers as many CLOCK frames as the argument says, records, and replies with
the JSON of its `RankRecording`."""

CLOCK = struct.Struct("<QQ")
"""The payload of the follower's CLOCK frames: when it received and when it sent, in nanoseconds of its clock."""

CLOCK_TIMEOUT, CLOCK_SPIN = 10.0, 0.002
"""Seconds for one round trip of CLOCK frames, and those in which either side awaits one without sleeping: a process
that sleeps answers later."""

SILENT_METHODS = WEIGHT_METHODS | {"profile", TRACE_START, TRACE_RESULT}
"""Calls in which a rank's process may send no heartbeats: torch starts and writes a profile, and loads weights, while
it holds the interpreter's lock."""

SILENT_SECONDS = 600.0
"""Seconds of silence that are allowed in these."""

STEP_METHODS = frozenset({EXECUTE, SAMPLE, "take_draft_token_ids"})
"""Calls of the decode loop: both ranks run them, only the leader's result is used (as vLLM's own
multiprocessing executor does), so the follower does not answer."""


class Call(NamedTuple):
    """One worker call: a method's name or a function that takes the worker, and its arguments."""

    method: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Header(NamedTuple):
    """The header before a call's pickle."""

    step: int
    digest: bytes
    number: int


class RemoteError(SparkError):
    """A worker call failed on the follower.

    Attributes:
        details: the follower's traceback; empty if it is not known.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def encode_call(
    token_digest: tuple[int, bytes],
    method: str | Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    number: int = 0,
) -> bytes:
    """The bytes of a call.

    Calls whose arguments may contain a user's objects (all but the steps of requests that already run) are pickled by
    value, because the follower cannot import the functions and classes of a script. That takes 16 us more.

    Raises:
        TypeError: the arguments cannot be pickled; the sentence names the call.
    """
    content, header = (method, args, kwargs), _HEADER.pack(*token_digest, number)
    executes = method in (EXECUTE, EXECUTE_THEN_SAMPLE)
    if executes or method in STEP_METHODS:
        new_requests = executes and args[0].scheduled_new_reqs
        dumps: Callable[[Any], bytes] = cloudpickle.dumps if new_requests else _dumps_fast
    else:
        dumps = dumps_by_value
    try:
        return header + dumps(content)
    except Exception as error:
        name = method if isinstance(method, str) else getattr(method, "__qualname__", repr(method))
        raise TypeError(f"the call of {name} cannot be sent to the follower: {error}") from error


def _dumps_fast(content: Any) -> bytes:
    return pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)


def decode_header(payload: bytes) -> Header:
    """The header of a call; nothing is unpickled."""
    return Header(*_HEADER.unpack_from(payload))


def decode_call(payload: bytes) -> Call:
    """The call in `payload`, which must come from an authenticated peer.

    Raises:
        whatever unpickling raises: ImportError for a module that only the leader has, for example.
    """
    return Call(*pickle.loads(memoryview(payload)[_HEADER.size :]))


def encode_result(result: Any, number: int) -> bytes:
    """The bytes of a successful reply to the call of that number.

    Pickled by value, because the result may contain a user's objects.
    """
    return _NUMBER.pack(number) + dumps_by_value((True, result, ""))


def encode_error(error: BaseException, number: int) -> bytes:
    """The bytes of a failed reply to the call of that number."""
    content = (False, described(error), "".join(traceback.format_exception(error)))
    return _NUMBER.pack(number) + pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)


def replied_number(payload: bytes) -> int:
    """The number of the call that a reply answers; nothing is unpickled."""
    (number,) = _NUMBER.unpack_from(payload)
    return int(number)


def decode_reply(payload: bytes) -> Any:
    """The result in a reply.

    Raises:
        RemoteError: the call failed on the follower.
    """
    succeeded, result, details = pickle.loads(memoryview(payload)[_NUMBER.size :])
    if not succeeded:
        raise RemoteError(f"the follower's worker failed: {result}", details)
    return result
