"""Memory of one machine: weights, and what its sequences keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_spark.estimate.model import Model
from vllm_spark.estimate.step import Workload


@dataclass(frozen=True)
class Memory:
    """Bytes on one machine.

    Attributes:
        weights: of the model and its draft.
        sequences: KV caches and recurrent states of the step's sequences.
        communicators: of NCCL; 0 without it.
        usable: what vLLM may use in all. Activations and CUDA graphs are not counted, and take some of it.
        more_tokens: that the KV cache has room for besides; None: the model keeps nothing for each token.
    """

    weights: float
    sequences: float
    communicators: float
    usable: float
    more_tokens: int | None

    @property
    def fits(self) -> bool:
        """Whether all of it is within `usable`."""
        return self.weights + self.sequences + self.communicators <= self.usable


def memory_of(models: Sequence[Model], work: Workload, usable: float, communicators: float = 0.0) -> Memory:
    """The memory of one rank's parts of a model and of its draft, if there is one."""
    weights = sum(model.weight_bytes for model in models)
    kept = [each for model in models for each in model.memories]
    sequences = work.batch * sum(each.count * each.bytes_of(work.context + work.rows, work.kv_bytes) for each in kept)
    token = sum(each.count * each.token_values * work.kv_bytes for each in kept if each.window is None)
    rest = max(0.0, usable - weights - sequences - communicators)
    return Memory(weights, sequences, communicators, usable, int(rest / token) if token else None)
