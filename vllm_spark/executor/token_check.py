"""Keeping the two ranks' tokens the same, and noticing at once if they are not.

Both ranks sample for themselves from the same gathered logits, and each feeds its own token into the next step.
One draw too many from a random generator on one side would let them drift apart in silence. So the worker's
generators are kept apart from whatever else runs in the leader's process, and both ranks keep a rolling digest
of what they sampled, which the leader sends along with its calls and the follower compares.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from types import TracebackType
from typing import Any

from vllm_spark.errors import SparkError

_HISTORY = 4096  # steps; both sides are never further apart than the scheduler's queue, which is a handful


class DriftError(SparkError):
    """The two ranks sampled different tokens in the same step."""


class TokenLedger:
    """A rolling digest over every step's sampled tokens, comparable with the other rank's. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._digest = bytes(8)
        self._step = 0
        self._mine: OrderedDict[int, bytes] = OrderedDict()
        self._theirs: OrderedDict[int, bytes] = OrderedDict()

    def record(self, output: Any) -> None:
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
        """Steps recorded so far, and the 8-byte digest over them."""
        with self._lock:
            return self._step, self._digest

    def compare(self, step: int, digest: bytes) -> None:
        """Takes the other rank's digest after `step` steps.

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
                "so that answers from there on may be wrong; start vllm serve again (vllm-spark join waits for it), "
                "and if it happens again, compare both machines with vllm-spark doctor --peer, try without speculation "
                "and without code of your own or the model's, and report what makes the difference"
            )


class WorkerRandomState:
    """A context in which the worker's random generators are the process's global ones.

    Outside of it the process has generators of its own, so that nothing but the worker advances the worker's:
    torch's CPU generator and NumPy's global one. (A CUDA device's generator is used by the worker alone.)
    About 4 us per use: torch's state is copied (5 KiB), NumPy's bit generator is swapped.
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
