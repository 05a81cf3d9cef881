"""Detects at once if the two ranks sample different tokens, and keeps their random generators equal.

Both ranks sample on their own from the same gathered logits, and each uses its own token in the next step. One extra
draw from a random generator on one rank would make their tokens differ, unnoticed. So `TokenDigest` is a rolling digest
of the sampled tokens, which the leader sends with its calls and the follower compares. `WorkerRandomState` keeps the
worker's generators separate from other users of the global ones in the leader's process.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from types import TracebackType
from typing import Any

from vllm_spark.errors import SparkError

_HISTORY = 4096  # steps; the ranks are never further apart than the scheduler's queue of a few steps


class DriftError(SparkError):
    """The two ranks sampled different tokens in the same step."""


class TokenDigest:
    """A rolling digest over the sampled tokens of every step, compared with the other rank's. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digest = bytes(8)
        self._step = 0
        self._mine: OrderedDict[int, bytes] = OrderedDict()
        self._theirs: OrderedDict[int, bytes] = OrderedDict()

    def update(self, output: Any) -> None:
        """Adds one step: a vLLM `ModelRunnerOutput` (its request ids and sampled token ids).

        Raises:
            DriftError: the other rank's digest of this step is known and differs.
        """
        tokens = getattr(output, "sampled_token_ids", None)
        if not tokens:
            return
        step = repr((output.req_ids, [list(ids) for ids in tokens])).encode()
        with self._lock:
            self._digest = hashlib.blake2b(self._digest + step, digest_size=8).digest()
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
        if mine is not None and theirs is not None and mine != theirs:
            raise DriftError(
                f"the ranks sampled different tokens at step {step} (digest {mine.hex()} here, {theirs.hex()} there), "
                "so the answers from there on may be wrong; start vllm serve again (vllm-spark join waits for it), "
                "and if it happens again, compare both machines with vllm-spark doctor --peer, try without speculation "
                "and without code of your own or the model's, and report which of them causes it"
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


def _remember(history: OrderedDict[int, bytes], step: int, digest: bytes) -> None:
    history[step] = digest
    while len(history) > _HISTORY:
        history.popitem(last=False)
