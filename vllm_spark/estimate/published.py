"""Measured decode speeds that the estimate is compared with: by others on GB10, and by this project on other GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_spark.estimate.collectives import (
    DIRECT,
    MODELLED_WIRE,
    NCCL,
    NCCL_EAGER,
    NCCL_H200,
    Collectives,
)
from vllm_spark.estimate.experts import SKEW
from vllm_spark.estimate.gpu import GB10, H100, H200, Gpu
from vllm_spark.estimate.step import ATTENTION, COLLECTIVES, DRAFT, EXPERTS, HEAD, HOST, NORMS, PROJECTIONS, ROUTER
from vllm_spark.models.weights import Mxfp4, Weights

Measure = Literal["tokens/s", "ms"]

EAGLE3_ACCEPTANCE = 0.58
"""The acceptance of the EAGLE3 head in the figures below is not published. This is what vLLM measured at the first
drafted token with another head (vllm pull request 24243, MiniCPM3: 0.57 and 0.58). 0.1 more is 6 % more tokens."""

EAGLE3_HEAD: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 151936,
    "draft_vocab_size": 32000,
}
"""The head for Qwen3-Coder-30B-A3B: one layer, about 0.37 GB in bfloat16 (its model page). The widths are not verified;
these give 0.37 GB."""

QWEN36_27B_FP8: Mapping[str, Any] = {
    "model_type": "qwen3_5",
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "full_attention_interval": 4,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "vocab_size": 248320,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
"""From a config.json quoted in a public file; `linear_num_value_heads` is not verified."""


@dataclass(frozen=True)
class Published:
    """Figures of one set-up.

    Attributes:
        what: model and set-up.
        source: who measured it, and where it is written.
        measure: tokens per second of all sequences, or milliseconds of a step.
        values: the least and the most of each figure, by batches.
        batches: sequences at once.
        model: a name in configs/models, or a config.json.
        tp: machines, or GPUs.
        gpu: of each.
        collectives: None on one machine.
        context: tokens of each sequence, on average.
        drafted: tokens with the EAGLE3 head above.
        quantization: in place of the config.json's; empty: none.
        stored: format of all matrices and the head, if another than config.json says.
        expert_parallel: with vLLM's --enable-expert-parallel.
        compiled: with torch.compile.
        shard: one rank's half as a complete model, without collectives.
        kv_bytes: of a number in the KV cache.
        why: what explains a large error.
        skew: of the experts' popularity.
        bad_setup: a set-up that its owner or others found faulty; not counted in means.
    """

    what: str
    source: str
    measure: Measure
    values: tuple[tuple[float, float], ...]
    model: str | Mapping[str, Any]
    tp: int
    gpu: Gpu = GB10
    collectives: Collectives | None = None
    batches: tuple[int, ...] = (1,)
    context: int = 0
    drafted: int = 0
    quantization: Mapping[str, Any] | None = None
    stored: Weights | None = None
    expert_parallel: bool = False
    compiled: bool = True
    shard: bool = False
    kv_bytes: float = 2
    skew: float = SKEW
    why: str = ""
    bad_setup: bool = False


_FLASH = "flash7777/vllm-marlin-sm12x, February and March 2026, batch 1"
_ARENA = "spark-arena.com"
_CODER = "qwen3-coder-30b-a3b-int4"
_AUTO_ROUND: Mapping[str, Any] = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
_CONSELARA = "conselara.dev/notes/dgx-spark-benchmarks, May 2026"

BY_OTHERS: tuple[Published, ...] = (
    Published(
        "Qwen3-Coder-30B-A3B INT4, EAGLE3, TP=1", _FLASH, "tokens/s", ((92, 97),), _CODER, 1, drafted=1, context=200
    ),
    Published(
        "Qwen3-Coder-30B-A3B INT4, EAGLE3, TP=2, NCCL in graphs",
        _FLASH,
        "tokens/s",
        ((107.8, 109.8),),
        _CODER,
        2,
        collectives=NCCL,
        drafted=1,
        context=200,
        why="NCCL is assumed to hide half of its time behind kernels, as it does on an H200; with nothing hidden the "
        "estimate is 6 % below the figure. Its time in these graphs was not measured inside of a step.",
    ),
    Published(
        "Qwen3-Coder-30B-A3B INT4, EAGLE3, TP=2, NCCL outside of graphs",
        _FLASH,
        "tokens/s",
        ((116.3, 118.6),),
        _CODER,
        2,
        collectives=NCCL_EAGER,
        drafted=1,
        context=200,
    ),
    Published(
        "Qwen3-Coder-30B-A3B INT4, TP=1",
        _FLASH,
        "tokens/s",
        ((86.4, 86.9),),
        _CODER,
        1,
        context=200,
        why="Of 13.5 ms the output head takes 3.6, at cuBLAS's rate for one row, which was measured with another width "
        "and half a year later. With the memory's bandwidth for it the estimate is 8 % below the figure; the rest is "
        "Marlin, which must have read faster than 187 GB/s here.",
    ),
    Published(
        "Qwen3-Coder-30B-A3B INT4, TP=2, NCCL in graphs, Ray",
        _FLASH,
        "tokens/s",
        ((91.6, 91.6),),
        _CODER,
        2,
        collectives=NCCL,
        context=200,
    ),
    Published(
        "MiniMax-M2.5 INT4, TP=2, NCCL in graphs, Ray",
        _FLASH,
        "tokens/s",
        ((41.7, 41.7),),
        "minimax-m2-int4",
        2,
        collectives=NCCL,
        context=200,
    ),
    Published(
        "Qwen3-Coder-30B-A3B INT4, TP=2, NCCL in graphs, Ray, 16K of context",
        _FLASH,
        "tokens/s",
        ((73.5, 73.5),),
        _CODER,
        2,
        collectives=NCCL,
        context=16384 + 200,
    ),
    Published(
        "MiniMax-M2.5 INT4, TP=2, NCCL in graphs, Ray, 16K of context",
        _FLASH,
        "tokens/s",
        ((26.2, 26.2),),
        "minimax-m2-int4",
        2,
        collectives=NCCL,
        context=16384 + 200,
        why="The KV cache, 2.1 GB for each machine, took 14 ms, which is 147 GB/s: its attention kernels did not reach "
        "the memory's bandwidth, while those of Qwen3-Coder did.",
    ),
    Published(
        "Qwen3-Coder-Next INT4, padded for Marlin, TP=2, NCCL outside of graphs",
        _FLASH,
        "tokens/s",
        ((87.7, 87.7),),
        "qwen3-coder-next-int4",
        2,
        collectives=NCCL_EAGER,
        context=200,
    ),
    Published(
        "Qwen3.5-122B-A10B GPTQ-INT4, TP=2, NCCL outside of graphs",
        _FLASH,
        "tokens/s",
        ((23.8, 24.6),),
        "qwen3.5-122b-a10b-int4",
        2,
        collectives=NCCL_EAGER,
        context=200,
    ),
    Published(
        "Qwen3.5-122B-A10B AutoRound INT4, TP=1",
        "albond/DGX_Spark_Qwen3.5-122B-A10B-AR-INT4, its baseline",
        "tokens/s",
        ((28.3, 28.3),),
        "qwen3.5-122b-a10b-int4",
        1,
        context=200,
        quantization=_AUTO_ROUND,
    ),
    Published(
        "Qwen3-Coder-30B-A3B BF16, TP=1", _FLASH, "tokens/s", ((30.6, 30.6),), _CODER, 1, context=200, quantization={}
    ),
    Published(
        "Qwen3-Coder-30B-A3B FP8, TP=1",
        _FLASH,
        "tokens/s",
        ((50.5, 50.5),),
        _CODER,
        1,
        context=200,
        quantization={"quant_method": "fp8"},
        why="vLLM's default tiles of that time for FP8 experts were slower than today's by more than 20 % on a GB10 "
        "(eugr/spark-vllm-docker pull request 207).",
    ),
    Published(
        "Qwen3-Coder-30B-A3B NVFP4, FlashInfer's CUTLASS, TP=1",
        _FLASH,
        "tokens/s",
        ((65.0, 65.0),),
        _CODER,
        1,
        context=200,
        quantization={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
    ),
    Published(
        "gpt-oss-120b, all matrices in MXFP4, TP=1",
        _ARENA,
        "tokens/s",
        ((58.8, 58.8),),
        "gpt-oss-120b",
        1,
        context=2048,
        stored=Mxfp4(),
        kv_bytes=1,
    ),
    Published(
        "gpt-oss-120b, all matrices in MXFP4, TP=2, NCCL",
        _ARENA,
        "tokens/s",
        ((76.0, 76.0),),
        "gpt-oss-120b",
        2,
        collectives=NCCL,
        context=2048,
        stored=Mxfp4(),
        kv_bytes=1,
        why="Its image multiplies by CUTLASS kernels of which the owner says that they are bound by latency; halves of "
        "matrices then take more than half of the time. Another owner measured 69 there, without graphs.",
    ),
    Published(
        "Qwen3-235B-A22B INT4, TP=2, expert parallel, NCCL, Ray",
        _CONSELARA,
        "tokens/s",
        ((17.0, 17.0),),
        "qwen3-235b-a22b-int4",
        2,
        collectives=NCCL,
        context=128,
        expert_parallel=True,
        kv_bytes=1,
        why="The step takes 11 ms longer than estimated: 60 us for each of 190 collectives, or the same time of the "
        "host. Ray costs 1.5 ms a token by flash7777's figures (92.4 and 107.8 tokens per second with and without); "
        "the rest is NCCL's set-up there, or unknown.",
    ),
    Published(
        "Qwen3.6-27B FP8, TP=2, SGLang, NCCL over a bonded interface",
        "al-engr.com/qwen3.6-tp2-result.html",
        "tokens/s",
        ((8.1, 8.7),),
        QWEN36_27B_FP8,
        2,
        collectives=NCCL,
        context=128,
        bad_setup=True,
        why="The set-up cost 54 of 119 ms: 0.4 ms for each of 130 collectives in addition to NCCL's usual time. It had "
        "a bonded interface; over sockets flash7777 saw 0.12 ms more for each than over RoCE. The owner's figure for "
        "one machine, 22.6, was with speculation; without it one machine reads 27 GB for a token, which makes 8.2 by "
        "this estimate: so the second machine gave what the collectives took.",
    ),
)
"""On GB10, one sequence, by others."""

_SIX = (1, 2, 4, 8, 16, 32)
_KUBIS = "kubis.ai/blog/dgx_series/benchmarks/gpt-oss-120b-topology-benchmark, March 2026, without graphs"
SEVERAL_SEQUENCES: tuple[Published, ...] = (
    Published(
        "Qwen3-235B-A22B INT4, TP=2, expert parallel, NCCL, Ray, several sequences",
        _CONSELARA,
        "tokens/s",
        ((24.1, 24.1), (36.4, 36.4)),
        "qwen3-235b-a22b-int4",
        2,
        collectives=NCCL,
        batches=(2, 4),
        context=128,
        expert_parallel=True,
        kv_bytes=1,
        why="As with one sequence.",
    ),
    Published(
        "gpt-oss-120b, all matrices in MXFP4, TP=1, several sequences",
        _KUBIS,
        "tokens/s",
        tuple((value, value) for value in (57.5, 78.4, 107.9, 153.5, 218.5, 318.7)),
        "gpt-oss-120b",
        1,
        batches=_SIX,
        context=1088,
        stored=Mxfp4(),
        kv_bytes=1,
        why="llama-benchy's prompts come from one book, and its sequences share experts: 32 read no more than 50 "
        "of 128, since more would take longer than the whole step at the memory's bandwidth; the estimate has 68.",
    ),
    Published(
        "gpt-oss-120b, all matrices in MXFP4, TP=2, NCCL, several sequences",
        _KUBIS,
        "tokens/s",
        tuple((value, value) for value in (69.0, 104.1, 155.3, 231.0, 342.1, 471.7)),
        "gpt-oss-120b",
        2,
        collectives=NCCL_EAGER,
        batches=_SIX,
        context=1088,
        stored=Mxfp4(),
        kv_bytes=1,
        why="As with TP=1; and without graphs one sequence waits for the host.",
    ),
)
"""On GB10, several sequences at once, by others."""

_H200 = "benchmarks/NOTES.md, entry 13, with torch.compile"
_H100 = "benchmarks/NOTES.md, entry 11, without torch.compile"
_TUNED = "benchmarks/NOTES.md, entry 14, vLLM's defaults, with torch.compile"
_QWEN = "qwen3-30b-a3b-int4"
_THREE = (1, 4, 8)


def _own(
    what: str,
    source: str,
    values: tuple[float, float, float],
    gpu: Gpu,
    collectives: Collectives | None,
    shard: bool = False,
) -> Published:
    return Published(
        what,
        source,
        "ms",
        tuple((value, value) for value in values),
        _QWEN,
        1 if collectives is None else 2,
        gpu,
        collectives,
        _THREE,
        context=100,
        compiled=source != _H100,
        shard=shard,
        skew=0.0,  # random weights
    )


OWN: tuple[Published, ...] = (
    _own("H200, one rank", _H200, (3.82, 4.73, 5.79), H200, None),
    _own("two H200, NCCL over host memory", _H200, (4.69, 5.31, 6.11), H200, NCCL_H200),
    _own("two H200, vllm_spark direct", _H200, (3.98, 4.56, 5.32), H200, DIRECT),
    _own("two H200, vllm_spark over the modelled wire", _H200, (4.48, 5.68, 6.56), H200, MODELLED_WIRE),
    _own("H100, one rank, without torch.compile", _H100, (4.15, 5.15, 6.39), H100, None),
    _own("two H100, NCCL over host memory, without torch.compile", _H100, (4.99, 5.70, 6.47), H100, NCCL_H200),
    _own("two H100, vllm_spark direct, without torch.compile", _H100, (4.26, 4.85, 5.61), H100, DIRECT),
    _own("H100, one rank", _TUNED, (3.954, 4.963, 6.146), H100, None),
    _own("H100, one rank's half, no collectives", _TUNED, (3.627, 4.102, 4.749), H100, None, shard=True),
)
"""Qwen3-30B-A3B INT4 with random weights, milliseconds for a step of 1, 4 and 8 sequences, by this project."""

STEP_OF_8_47_MS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    ("97 all-reduces", 1.88, (COLLECTIVES,)),
    ("MoE GEMMs", 2.55, (EXPERTS,)),
    ("attention and KV write", 1.44, (ATTENTION,)),
    ("other Marlin GEMMs", 1.44, (PROJECTIONS,)),
    ("routing", 0.28, (ROUTER,)),
    ("norms and activations", 0.31, (NORMS,)),
    ("CPU", 0.46, (HOST,)),
    ("output head, EAGLE3, rest", 0.11, (HEAD, DRAFT)),
)
"""Where 8.47 ms of a token go (118 tokens per second) by flash7777's TOKEN_TIME_MAP: parts, milliseconds, and the
parts of a step here. Its kernels' shares, traced while graphs were captured, are scaled to fill the time of one token,
but for the all-reduces, of which those of a whole step are counted."""
