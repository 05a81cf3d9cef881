"""A decode step as a list of kernels, and the time of its parts.

Kernels by layer, as vLLM 0.26 runs them with torch.compile (`bench decode --profile`, benchmarks/NOTES.md, entry 13;
768 for 48 layers with attention and experts): two norms; rotary embedding with the norms of queries and keys, writing
the KV cache, attention and its reduction; two linear layers; the router's matrix and three that choose and sort; two
for the experts with their activation and sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from vllm_spark.estimate.collectives import Collectives
from vllm_spark.estimate.experts import SKEW, busier_half, distinct_experts, independent_rows
from vllm_spark.estimate.gpu import Gpu
from vllm_spark.estimate.model import (
    SMALL_BYTES,
    Model,
    bytes_of_weight,
    dense_bytes,
    expert_bytes,
    is_mlp_end,
    is_shared,
    layer_weights,
)
from vllm_spark.models.layers import Dense
from vllm_spark.models.text_model import Mixer
from vllm_spark.models.weights import Bf16, Weights

EXPERTS, SHARED, MLP = "routed experts", "shared experts", "MLP"
PROJECTIONS, LINEAR = "attention projections", "linear attention projections"
HEAD, ATTENTION, STATES = "output head", "attention and KV reads", "recurrent states"
NORMS, ROUTER, DRAFT = "norms and activations", "router", "draft"
COLLECTIVES, HOST = "collectives", "host"

ORDER = (EXPERTS, SHARED, MLP, PROJECTIONS, LINEAR, HEAD, ATTENTION, STATES, ROUTER, NORMS, DRAFT, COLLECTIVES, HOST)
"""Parts in the order of reports; what a step lacks is left out."""

_MIXING_KERNELS: Mapping[Mixer, int] = {"full": 4, "sliding": 4, "latent": 5, "delta": 4, "mamba": 3}
"""Kernels without weights of a layer that mixes tokens. `latent`: norms, rotary embedding, writing the cache, attention
and its reduction; `delta`: convolution, gates, recurrence, gated norm; `mamba`: convolution, recurrence, gated norm.
There is no profile of `delta` and `mamba`."""

_ROUTING_KERNELS, _EXPERT_KERNELS, _MLP_KERNELS = 3, 2, 1
_SHARED_KERNELS = 3  # activation, gate, sum
_NORMS_PER_MIXER, _NORMS_PER_MLP = 1, 1
_STEP_KERNELS = 4  # embedding, last norm, logits to float32, the most probable token
_UNCOMPILED_KERNELS = 4
"""More for each layer without torch.compile: 990 in all for 48 layers in entry 11, where this module counts 768."""


@dataclass(frozen=True)
class Workload:
    """What a step computes.

    Attributes:
        batch: sequences.
        context: tokens that each has already.
        rows: of each sequence: 1, and one for each drafted token that is verified.
        kv_bytes: of a number in the KV cache: 2 for bfloat16, 1 for fp8.
        compiled: whether vLLM's torch.compile joins small kernels.
        skew: of the experts' popularity, as in `experts.py`.
    """

    batch: int = 1
    context: int = 0
    rows: int = 1
    kv_bytes: float = 2
    compiled: bool = True
    skew: float = SKEW

    @property
    def all_rows(self) -> int:
        """Rows of the step's matrices."""
        return self.batch * self.rows


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: one of `ORDER`.
        us: that the step takes longer because of it.
        read_bytes: of this rank's memory that it reads (and, of recurrent states, writes).
        kernels: launches, or collectives.
    """

    name: str
    us: float
    read_bytes: float = 0
    kernels: int = 0


@dataclass(frozen=True)
class Step:
    """A decode step of one rank.

    Attributes:
        parts: in the order of `ORDER`.
        hidden_us: of collectives, that other kernels run meanwhile; not contained in any part.
    """

    parts: tuple[Part, ...]
    hidden_us: float = 0

    @property
    def us(self) -> float:
        """Of the whole step."""
        return sum(part.us for part in self.parts)

    @property
    def read_bytes(self) -> float:
        """That one rank reads."""
        return sum(part.read_bytes for part in self.parts)

    def part_us(self, name: str) -> float:
        """Of one part; 0 if the step lacks it."""
        return sum(part.us for part in self.parts if part.name == name)


def decode_step(model: Model, work: Workload, gpu: Gpu, collectives: Collectives | None) -> Step:
    """The step of one rank; without collectives (None) as if the other rank's sums came in no time."""
    parts = [*_forward(model, work, gpu), Part(HOST, gpu.host_us + (gpu.pair_us if model.tp > 1 else 0))]
    if collectives is None or model.tp == 1:
        return Step(joined(parts))
    calls = collective_calls(model, work.all_rows)
    exposed = sum(count * collectives.exposed_us(size) for size, count in calls)
    alone = sum(count * collectives.alone_us(size) for size, count in calls)
    parts.append(Part(COLLECTIVES, exposed, kernels=sum(count for _, count in calls)))
    return Step(joined(parts), max(0.0, alone - exposed))


def draft_pass(model: Model, work: Workload, gpu: Gpu, collectives: Collectives | None) -> Part:
    """A draft's forward pass as one part, without time of the host: that is in the step which drafts."""
    parts = list(_forward(model, work, gpu))
    calls = collective_calls(model, work.all_rows) if collectives is not None and model.tp > 1 else []
    waits = sum(count * collectives.exposed_us(size) for size, count in calls) if collectives is not None else 0.0
    return Part(
        DRAFT,
        sum(part.us for part in parts) + waits,
        sum(part.read_bytes for part in parts),
        sum(part.kernels for part in parts) + sum(count for _, count in calls),
    )


def collective_calls(model: Model, rows: int) -> list[tuple[int, int]]:
    """Bytes and number of a step's collectives: all-reduces of hidden states, and one all-gather of logits."""
    sums = 1 + model.mixers + model.mlps
    return [(rows * model.hidden * SMALL_BYTES, sums), (rows * model.own_vocabulary * SMALL_BYTES, 1)]


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Parts of equal names added, in the order of `ORDER`."""
    sums: dict[str, Part] = {}
    for part in parts:
        before = sums.get(part.name, Part(part.name, 0.0))
        sums[part.name] = Part(
            part.name, before.us + part.us, before.read_bytes + part.read_bytes, before.kernels + part.kernels
        )
    return tuple(sums[name] for name in ORDER if name in sums)


def _forward(model: Model, work: Workload, gpu: Gpu) -> Iterator[Part]:
    """What the GPU computes in one pass, without collectives."""
    yield from _linear_layers(model, work, gpu)
    yield from _experts(model, work, gpu)
    yield from _mixing(model, work, gpu)
    norms = _NORMS_PER_MIXER * model.mixers + (_NORMS_PER_MLP + _MLP_KERNELS) * model.mlps + _STEP_KERNELS
    if not work.compiled:
        norms += _UNCOMPILED_KERNELS * model.decoder_layers
    yield _small(NORMS, norms, gpu)
    yield _matrices(HEAD, 1, model.head_bytes, model.own_vocabulary * model.hidden, model.head, work.all_rows, gpu)


def _linear_layers(model: Model, work: Workload, gpu: Gpu) -> Iterator[Part]:
    for layer in model.dense:
        part, weights = _part_of(layer), layer_weights(layer)
        size = layer.size_n * layer.size_k
        yield _matrices(part, layer.count, dense_bytes(layer), size, weights, work.all_rows, gpu)
        if is_shared(layer) and is_mlp_end(layer):
            yield _small(SHARED, _SHARED_KERNELS * layer.count, gpu)


def _part_of(layer: Dense) -> str:
    if is_shared(layer):
        return SHARED
    if layer.name.startswith("linear_attn.") or layer.name in ("mixer.in_proj", "mixer.out_proj"):
        return LINEAR
    if layer.name.endswith(("up_proj", "down_proj", "latent_proj")):
        return MLP
    return PROJECTIONS


def _experts(model: Model, work: Workload, gpu: Gpu) -> Iterator[Part]:
    for layer in model.experts:
        rows = independent_rows(work.batch, work.rows)
        read = distinct_experts(layer.experts, layer.top_k, rows, work.skew)
        share = 1.0
        if model.expert_parallel:  # a rank has whole experts: twice the bytes of half of them
            share = 2 * busier_half(layer.experts, read) / read
        size = expert_bytes(layer) / bytes_of_weight(layer.weights, layer.hidden)
        assigned = layer.top_k * work.all_rows * size * share
        for kernel in range(2):  # gate and up, down
            part = (2, 1)[kernel] / 3 if layer.gated else 1 / 2
            bandwidth = gpu.bandwidth(layer.weights, _SEVERAL_ROWS)
            reads = read * share * expert_bytes(layer) * part
            each = gpu.start_us(layer.weights) + max(reads / bandwidth / 1e3, 2 * assigned * part / gpu.tflops / 1e6)
            yield Part(EXPERTS, layer.count * each, layer.count * reads, layer.count)
        yield _small(NORMS, (_EXPERT_KERNELS - _MLP_KERNELS) * layer.count, gpu)
        router = model.router_bytes(layer)
        yield _matrices(ROUTER, layer.count, router, router / SMALL_BYTES, Bf16(), work.all_rows, gpu)
        yield _small(ROUTER, _ROUTING_KERNELS * layer.count, gpu)


_SEVERAL_ROWS = 2
"""Kernels of experts are not cuBLAS, and read a single row's experts as fast as those of several."""


def _mixing(model: Model, work: Workload, gpu: Gpu) -> Iterator[Part]:
    for kept in model.memories:
        part = STATES if kept.mixer in ("delta", "mamba") else ATTENTION
        passes = 2 if part == STATES else 1  # a state is written back, whole
        moved = passes * work.batch * kept.bytes_of(work.context, work.kv_bytes)
        kernels = _MIXING_KERNELS[kept.mixer]
        each = kernels * gpu.kernel_us + moved / gpu.gbytes_per_s / 1e3
        yield Part(part, kept.count * each, kept.count * moved, kept.count * kernels)


def _matrices(part: str, count: int, size: float, numbers: float, weights: Weights, rows: int, gpu: Gpu) -> Part:
    """Equal matrices of `size` bytes and as many numbers, each multiplied with all rows by a kernel of its own."""
    reads = size / gpu.bandwidth(weights, rows) / 1e3
    multiplies = 2 * rows * numbers / gpu.tflops / 1e6
    return Part(part, count * (gpu.start_us(weights) + max(reads, multiplies)), count * size, count)


def _small(part: str, count: int, gpu: Gpu) -> Part:
    """Kernels that hardly read anything."""
    return Part(part, count * gpu.kernel_us, 0, count)
