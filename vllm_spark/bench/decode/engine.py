"""Runs one engine with random weights, and times each of its decode steps.

    python -m vllm_spark.bench.decode.engine JOB RESULT

Each candidate of `vllm-spark bench decode` runs in its own process: an engine frees its GPU only when its process
exits, and NCCL reads its settings once per process. The engine core runs in this process as well: in another one,
prompts would arrive one by one, and which are prefilled together, on which the last digits depend, would be random. JOB
and RESULT are JSON files of the structures below; RESULT is complete before the engine is shut down.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_spark.bench.kernel_profile import KernelProfile, profile_steps
from vllm_spark.files import atomic_write_text
from vllm_spark.records import from_json, to_json


@dataclasses.dataclass
class Job:
    """The engine's arguments, and what it decodes.

    Attributes:
        engine: arguments of `vllm.LLM`.
        batches: numbers of sequences that are decoded together, one after the other.
        prompt_tokens: length of each prompt.
        steps: decode steps that are timed for each batch.
        warm_up: decode steps before them.
        tuned: whether the process uses tuned tables of kernels' parameters; a pair always does.
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


@dataclasses.dataclass
class Result:
    """The measurements of one engine.

    Attributes:
        start_seconds: time to create the engine.
        milliseconds: for each batch, the time of each step.
        tokens: for each batch, the greedy tokens of each sequence.
        logprobs: for each batch, each sequence's first tokens of another decoding with their log-probabilities; None
            for one that is not finite.
        fallbacks: collectives that did not go through vllm_spark; None without it.
        profile: of rank 0's GPU; None if it was not requested, prefilling took too many steps, or the profiler saw no
            kernel.
        failed_end: error of a program that failed after these measurements were complete; empty if there was none.
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
"""Tokens of each sequence whose log-probabilities are compared; not in timed steps, since computing them takes time."""


PROFILED = 20
"""Steps whose kernels are timed, after the same number of untimed steps."""


@dataclasses.dataclass
class Decoded:
    """The result of decoding one batch.

    Attributes:
        milliseconds: from each output with a token of every sequence to the next.
        tokens: of each sequence.
        logprobs: of each sequence's tokens, with the tokens, if requested.
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
    """Times the kernels of some decode steps; None without kernels, or with too few steps of all sequences."""
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
    """Starts the engine, and decodes each batch three times: to warm up, with times, and with log-probabilities.

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
        decode(engine, job, batch, length)  # compiles kernels, and selects some, at their first use
        timed = decode(engine, job, batch, length)
        result.milliseconds[batch], result.tokens[batch] = timed.milliseconds[-job.steps :], timed.tokens
        result.logprobs[batch] = decode(engine, job, batch, min(length, LOGPROBS), logprobs=True).logprobs
    if job.profile:
        result.profile = _profile(engine, job, job.batches[0], max(length, 3 * PROFILED))
    if "spark" in job.engine.get("additional_config", {}):
        result.fallbacks = _fallbacks()
    keep(result)
    engine.engine_core.shutdown()  # ends the follower's session as well


def _with_tuned_tables(engine: dict[str, Any]) -> dict[str, Any]:
    """Makes this process use tuned tables; returns the engine's arguments with their key for vLLM's compile cache."""
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
    """Runs the job of the command line."""
    job_file, result_file = map(Path, sys.argv[1:])
    job = from_json(job_file.read_bytes(), Job)
    run(job, lambda result: atomic_write_text(result_file, to_json(result).decode(), "result"))


if __name__ == "__main__":
    main()
