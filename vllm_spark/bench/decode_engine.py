"""One engine that decodes with random weights, and the time of each of its steps.

    python -m vllm_spark.bench.decode_engine JOB RESULT

A program of its own for each candidate of `vllm-spark bench decode`: an engine gives its GPU back only when its process
ends, and NCCL reads its settings once in a process's life. The engine runs in this process: were it in another, prompts
would reach it one by one, and what is prefilled together, which decides over last digits, would be left to chance. JOB
and RESULT are JSON files of the structures below; RESULT is there, whole, before the engine is shut down.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from vllm_spark.bench.kernel_profile import KernelProfile, profile_steps
from vllm_spark.files import atomic_write_text


class Job(msgspec.Struct):
    """What the engine is, and what it decodes.

    Attributes:
        engine: arguments of `vllm.LLM`.
        batches: numbers of sequences that are decoded together, one after the other.
        prompt_tokens: length of each prompt.
        steps: decode steps that are timed for each batch.
        warm_up: decode steps before them.
        tuned: whether the process uses tuned tables of kernels' parameters; a pair does so in any case.
        profile: whether kernels are timed too, for the first batch.
    """

    engine: dict[str, Any]
    batches: list[int]
    prompt_tokens: int
    steps: int
    warm_up: int
    tuned: bool = False
    profile: bool = False


TokenLogprob = tuple[int, float | None]


class Result(msgspec.Struct):
    """What came of it.

    Attributes:
        start_seconds: from the arguments to an engine that is ready.
        milliseconds: for each batch, the time of each step.
        tokens: for each batch, the greedy tokens of each sequence.
        logprobs: for each batch, each sequence's first tokens of another decoding with their log-probabilities; None
            for one that is no finite number.
        fallbacks: collectives that did not go through vllm_spark; None without it.
        profile: of rank 0's GPU; None if it was not asked for, prefilling took too many steps, or the profiler saw no
            kernel.
        failed_end: in words, how a program failed after these figures were complete; empty if all ended well.
    """

    vllm: str
    start_seconds: float
    milliseconds: dict[int, list[float]]
    tokens: dict[int, list[list[int]]]
    logprobs: dict[int, list[list[TokenLogprob]]]
    fallbacks: int | None
    profile: KernelProfile | None = None
    failed_end: str = ""


LOGPROBS = 64
"""Tokens of each sequence whose log-probabilities are compared. To ask for them takes time: not while a clock runs."""


PROFILED = 20
"""Steps whose kernels are timed, after so many that are not."""


class Decoded(msgspec.Struct):
    """What one decoding of a batch gave.

    Attributes:
        milliseconds: from each output with a token of every sequence to the next.
        tokens: of each sequence.
        logprobs: of each sequence's tokens, if they were asked for, with the tokens.
    """

    milliseconds: list[float]
    tokens: list[list[int]]
    logprobs: list[list[TokenLogprob]]


def decode(engine: Any, job: Job, batch: int, length: int, logprobs: bool = False) -> Decoded:
    """Decodes `length` tokens of each of `batch` sequences together.

    A step's time goes from one output of the engine to the next, when both have a token of every sequence, with
    scheduling and sampling in it.
    """
    sequences: dict[str, tuple[list[int], list[TokenLogprob]]] = {
        name: ([], []) for name in _ask(engine, job, batch, length, logprobs)
    }
    outputs_at: list[float] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if len(outputs) == batch:
            outputs_at.append(time.perf_counter())
        for output in outputs:
            tokens, of_tokens = sequences[output.request_id]
            new = output.outputs[0]
            tokens.extend(new.token_ids)
            for token, by_token in zip(new.token_ids, new.logprobs or [], strict=False):
                logprob = by_token[token].logprob
                of_tokens.append((token, logprob if math.isfinite(logprob) else None))
    times = [(after - before) * 1e3 for before, after in pairwise(outputs_at)]
    return Decoded(times, *map(list, zip(*sequences.values(), strict=True)))


def _profile(engine: Any, job: Job, batch: int, length: int) -> KernelProfile | None:
    """Times the kernels of some decode steps; None if there are none, or not enough whole steps came."""
    names = _ask(engine, job, batch, length, logprobs=False)

    def run_step() -> bool:
        while engine.has_unfinished_requests():
            if len(engine.step()) == batch:
                return True
        return False

    for _ in range(PROFILED):
        run_step()  # the prefill among them
    profile = profile_steps(engine.collective_rpc, run_step, PROFILED)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return profile


def _ask(engine: Any, job: Job, batch: int, length: int, logprobs: bool) -> list[str]:
    """Adds a request for each sequence, and returns their names."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0,
        max_tokens=length,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        logprobs=0 if logprobs else None,
    )
    vocabulary = engine.model_config.get_vocab_size()
    names = [f"{batch}-{sequence}" for sequence in range(batch)]
    for sequence, name in enumerate(names):
        prompt = [(31 * sequence + 7 * position + 11) % vocabulary for position in range(job.prompt_tokens)]
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    return names


def run(job: Job, keep: Callable[[Result], None]) -> None:
    """Starts the engine, and decodes each batch: to warm it up, with a clock, and for the log-probabilities.

    Args:
        keep: called with all figures, before the engine is shut down: that may fail, and takes nothing from them.
    """
    import vllm

    arguments = _with_tuned_tables(job.engine) if job.tuned else job.engine
    start = time.perf_counter()
    engine = vllm.LLM(**arguments).llm_engine
    result = Result(vllm.__version__, time.perf_counter() - start, {}, {}, {}, None)
    # One more output than differences, and one for the prefill, whose sequences may come in several steps.
    length = job.warm_up + job.steps + 2
    for batch in job.batches:
        decode(engine, job, batch, length)  # kernels that are compiled or chosen at their first use
        timed = decode(engine, job, batch, length)
        result.milliseconds[batch], result.tokens[batch] = timed.milliseconds[-job.steps :], timed.tokens
        result.logprobs[batch] = decode(engine, job, batch, min(length, LOGPROBS), logprobs=True).logprobs
    if job.profile:
        result.profile = _profile(engine, job, job.batches[0], max(length, 3 * PROFILED))
    if "spark" in job.engine.get("additional_config", {}):
        result.fallbacks = _fallbacks()
    keep(result)
    engine.engine_core.shutdown()  # tells the follower


def _with_tuned_tables(engine: dict[str, Any]) -> dict[str, Any]:
    """Makes this process use them, and returns the engine's arguments with what vLLM's compile cache must know."""
    from vllm_spark.kernels import runtime

    runtime.start()
    digest = runtime.compiled_digest()
    if digest is None:
        return engine
    return {**engine, "additional_config": {**engine.get("additional_config", {}), "atomic_add": digest}}


def _fallbacks() -> int:
    from prometheus_client import REGISTRY

    return round(
        sum(
            sample.value
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name == "vllm_spark_fallbacks_total"
        )
    )


def main() -> None:
    """Does the job of the command line."""
    job_file, result_file = map(Path, sys.argv[1:])
    job = msgspec.json.decode(job_file.read_bytes(), type=Job)
    run(job, lambda result: atomic_write_text(result_file, msgspec.json.encode(result).decode(), "result"))


if __name__ == "__main__":
    main()
