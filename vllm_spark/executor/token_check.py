"""Detects at once if the two ranks sample or draft different tokens, and keeps their random generators equal.

Both ranks sample on their own from the same gathered logits, and each uses its own token in the next step. One extra
draw from a random generator on one rank would make their tokens differ, unnoticed. With speculation each rank also
drafts on its own: a draft that is wrong on one rank alone is rejected, so that nothing but the speed would show it. So
`TokenDigest` is a rolling digest of the sampled (so of the accepted) and of the drafted tokens, which the leader sends
with its calls and the follower compares. `WorkerRandomState` keeps the worker's generators separate from other users of
the global ones in the leader's process.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from vllm_spark.errors import SparkError

_HISTORY = 4096  # steps; the ranks are never further apart than the scheduler's queue of a few steps
_HALF = 4  # bytes of the digest for the sampled tokens, and as many for the drafted ones


class DriftError(SparkError):
    """The two ranks sampled or drafted different tokens in the same step."""


class TokenDigest:
    """A rolling digest over the tokens of every step, compared with the other rank's. Thread-safe.

    Its first half covers the sampled tokens. The second half covers the drafted tokens that vLLM took from the worker
    before them: with asynchronous scheduling vLLM takes only those of requests with structured output.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sampled = self._drafted = bytes(8)
        self._digest = bytes(8)
        self._step = 0
        self._mine: OrderedDict[int, bytes] = OrderedDict()
        self._theirs: OrderedDict[int, bytes] = OrderedDict()

    def update(self, output: Any) -> None:
        """Adds one step: a vLLM `ModelRunnerOutput` (its request ids and sampled token ids).

        Or adds the drafts for the next step, a vLLM `DraftTokenIds`: they are compared together with that step.

        Raises:
            DriftError: the other rank's digest of this step is known and differs.
        """
        if drafts := getattr(output, "draft_token_ids", None):
            with self._lock:
                self._drafted = _chained(self._drafted, output.req_ids, drafts)
            return
        tokens = getattr(output, "sampled_token_ids", None)
        if not tokens:
            return
        with self._lock:
            self._sampled = _chained(self._sampled, output.req_ids, tokens)
            self._digest = self._sampled[:_HALF] + self._drafted[:_HALF]
            self._step += 1
            _remember(self._mine, self._step, self._digest)
            self._compare(self._step)

    def state(self) -> tuple[int, bytes]:
        """The number of steps so far, and the 8-byte digest over them."""
        with self._lock:
            return self._step, self._digest

    def compare(self, step: int, digest: bytes) -> None:
        """Compares the other rank's digest after `step` steps.

        Raises:
            DriftError: this rank's differs.
        """
        if step == 0:
            return
        with self._lock:
            _remember(self._theirs, step, digest)
            self._compare(step)

    def _compare(self, step: int) -> None:
        mine, theirs = self._mine.get(step), self._theirs.get(step)
        if mine is None or theirs is None or mine == theirs:
            return
        digests = f"(digest {mine.hex()} here, {theirs.hex()} there)"
        if mine[:_HALF] != theirs[:_HALF]:
            what = f"sampled different tokens at step {step} {digests}, so the answers from there on may be wrong"
        else:
            what = f"drafted different tokens for step {step} {digests}, so one of them computes wrong drafts"
        raise DriftError(
            f"the ranks {what}; start vllm serve again (vllm-spark join waits for it), and if it happens again, "
            "compare both machines with vllm-spark doctor --peer, try without speculation and without code of your own "
            "or the model's, and report which of them causes it"
        )


class WorkerRandomState:
    """A context in which the worker's random generators are the process's global ones.

    Outside of it the process uses other generators, so that only the worker advances the worker's: torch's CPU
    generator and NumPy's global one. (Only the worker uses a CUDA device's generator.) It costs about 4 us per use:
    torch's state is copied (5 KiB), NumPy's bit generator is swapped.
    """

    def __init__(self) -> None:
        import numpy
        import torch

        # NumPy's stubs do not list get_bit_generator and set_bit_generator.
        self._numpy: Any = numpy.random
        self._generator = torch.default_generator
        self._worker_bits = self._numpy.get_bit_generator()
        self._outer_bits: Any = numpy.random.MT19937()
        self._worker_state = self._generator.get_state()
        self._outer_state = torch.Generator().get_state()
        self._leave()

    def __enter__(self) -> None:
        self._outer_bits = self._numpy.get_bit_generator()
        self._outer_state = self._generator.get_state()
        self._numpy.set_bit_generator(self._worker_bits)
        self._generator.set_state(self._worker_state)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._worker_bits = self._numpy.get_bit_generator()
        self._worker_state = self._generator.get_state()
        self._leave()

    def _leave(self) -> None:
        self._numpy.set_bit_generator(self._outer_bits)
        self._generator.set_state(self._outer_state)


def _chained(digest: bytes, requests: Iterable[str], tokens: Iterable[Iterable[int]]) -> bytes:
    step = repr((list(requests), [list(ids) for ids in tokens])).encode()
    return hashlib.blake2b(digest + step, digest_size=8).digest()


def _remember(history: OrderedDict[int, bytes], step: int, digest: bytes) -> None:
    history[step] = digest
    while len(history) > _HISTORY:
        history.popitem(last=False)
