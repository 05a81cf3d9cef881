"""The steps of vLLM's start in which a rank may wait for the other one, found on a thread's stack or in a traceback.

vLLM measures, tunes and captures on each rank by itself, with collectives in between. What a rank has in its own caches
(of torch.compile, of FlashInfer's autotuner) may make it take another path, or another time, than the other one. Then
one of them waits in a collective that the other does not call, until its time-out. These functions determine the
step of each.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType

from vllm_spark.collective import CollectiveTimeoutError
from vllm_spark.config.settings import serve_flag
from vllm_spark.errors import PeerTimeoutError, without_stop


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step: what it is called in sentences, and what a user can do if the ranks do not end it together."""

    words: str
    remedy: str


_MORE_TIME = (
    f"if one machine takes longer, as without a cache that the other has, raise {serve_flag('collective_timeout')}"
)
_NO_AUTOTUNE = "start with --no-enable-flashinfer-autotune"

_STEPS = {
    "load_model": _Step("loading the model", _MORE_TIME),
    "determine_available_memory": _Step("measuring memory, for which it compiles the model", _MORE_TIME),
    "compile_or_warm_up_model": _Step("compilation and warm-up", _MORE_TIME),
    "kernel_warmup": _Step("the warm-up of kernels", _MORE_TIME),
    "deep_gemm_warmup": _Step("the warm-up of DeepGEMM's kernels", "set VLLM_DEEP_GEMM_WARMUP=skip"),
    "flashinfer_sparse_mla_decode_autotune_warmup": _Step("FlashInfer's autotuning of attention", _NO_AUTOTUNE),
    "deepseek_v4_sparse_mla_attention_warmup": _Step("FlashInfer's autotuning of attention", _NO_AUTOTUNE),
    "flashinfer_autotune": _Step("FlashInfer's autotuning", _NO_AUTOTUNE),
    "capture_model": _Step("the capture of CUDA graphs", "start with --enforce-eager"),
}
"""By the name of vLLM's function. Of several on a stack the last one of this table counts."""

LOADING = "load_model"


def step_of(thread: int | None) -> str:
    """The function of vLLM that names the step in which a thread of this process is; empty if it is in none."""
    return _last_of(_frames(sys._current_frames().get(thread or 0)))


def with_steps(error: Exception, rank: str, peer: str, peer_step: str) -> Exception:
    """`error`, or the same error with the steps in which both ranks were, if it is a time-out in a step of this rank.

    Args:
        error: with its traceback.
        rank, peer: names of this rank and of the other one in the sentence.
        peer_step: what the other rank's `step_of` has given last.
    """
    if not isinstance(error, CollectiveTimeoutError | PeerTimeoutError):
        return error
    step = _last_of(_raised_in(error.__traceback__))
    if not step:
        return error
    explained = type(error)(f"{without_stop(str(error))}; {_both(rank, step, peer, peer_step)}")
    return explained.with_traceback(error.__traceback__)


def unfinished(name: str, step: str, seconds: float) -> str:
    """The sentence for a rank that is in a step although the other one has finished it so long ago."""
    remedy = _STEPS[step].remedy if step in _STEPS else _MORE_TIME
    late = f"{name} has not finished {_words_of(step)} within {seconds:g} s after the other rank"
    return f"{late}; see its log, and {remedy}"


def _both(rank: str, step: str, peer: str, peer_step: str) -> str:
    """In which steps of vLLM's start both ranks were, and the remedies."""
    steps = [_STEPS[name] for name in (step, peer_step) if name in _STEPS]
    places = f"{rank} was in {_words_of(step)}, {peer} in {_words_of(peer_step)}"
    remedies = list(dict.fromkeys(each.remedy for each in steps if each.remedy != _MORE_TIME)) or [_MORE_TIME]
    return f"{places}; {' and '.join(remedies)}"


def _words_of(step: str) -> str:
    """What a step is called in sentences."""
    return _STEPS[step].words if step in _STEPS else step or "none of vLLM's known steps"


def _last_of(frames: Iterator[FrameType]) -> str:
    names = {frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__", "").startswith("vllm.")}
    return next((name for name in reversed(_STEPS) if name in names), "")


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _raised_in(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next
