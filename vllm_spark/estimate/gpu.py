"""What a GPU takes for a kernel of a decode step: its start, and its bytes over a bandwidth.

The constants are those of single kernels, or of the profile of one step on one GPU. None is fitted to the published
tokens per second, nor to a step of two ranks: those are what the model is compared with (`published.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_spark.models.weights import Bf16, Int4, Int8, Mxfp4, Nvfp4, Weights


@dataclass(frozen=True)
class Gpu:
    """One GPU model, with the memory of its machine.

    Attributes:
        name: for people.
        memory_gb: that the GPU can address, in 10^9 bytes.
        gbytes_per_s: bandwidth at which a kernel reads, once it has started.
        four_bit_gbytes_per_s: the same for kernels that unpack 4-bit weights.
        one_row_gbytes_per_s: the same for cuBLAS with an unquantized matrix and a single row.
        kernel_us: the start and the end of a kernel, which is all that a kernel takes that hardly reads.
        packed_us: the same of a kernel that unpacks integers or 4-bit weights (Marlin).
        host_us: of a step in which the GPU waits: between two graphs, for sampling and the next step's inputs.
        pair_us: what the second rank adds to that.
        tflops: dense bfloat16 that matrix kernels reach, 10^12 operations in a second.
    """

    name: str
    memory_gb: float
    gbytes_per_s: float
    four_bit_gbytes_per_s: float
    one_row_gbytes_per_s: float
    kernel_us: float
    packed_us: float
    host_us: float
    pair_us: float
    tflops: float

    def start_us(self, weights: Weights | None) -> float:
        """Of a kernel with these weights; None: without any."""
        return self.packed_us if isinstance(weights, Int4 | Int8 | Mxfp4 | Nvfp4) else self.kernel_us

    def bandwidth(self, weights: Weights | None, rows: int) -> float:
        """GB/s at which a kernel reads these weights for this many rows; None: anything but weights."""
        if isinstance(weights, Int4 | Mxfp4 | Nvfp4):
            return self.four_bit_gbytes_per_s
        if isinstance(weights, Bf16) and rows == 1:
            return self.one_row_gbytes_per_s
        return self.gbytes_per_s


GB10 = Gpu(
    name="GB10",
    memory_gb=128,
    gbytes_per_s=235,
    four_bit_gbytes_per_s=187,
    one_row_gbytes_per_s=175,
    kernel_us=2.4,
    packed_us=2.4,
    host_us=360,
    pair_us=100,
    tflops=110,
)
"""Published by others; this project has not measured one.

- 235 GB/s: streaming reads on a DGX Spark (InterfaceX-co-jp/glm53-tensorfold-spark, docs/ROOFLINE.md, W11); antirez/ds4
  pull request 773 has 231 to 234 of the data sheet's 273.
- 187 GB/s: Marlin with 4-bit experts, 150 to 187 by its owner's estimate from serving
  (vladimir-voinea/gb10-laguna-s-2.1-w4a16-moe). The upper end, since starts are counted apart here.
- 175 GB/s: cuBLAS takes 1.42 times as long for an output head and one row as a kernel that reads 240 to 255 GB/s, and
  1.03 times for two rows (a tuner's figures for 2560 x 248320, October 2026, and myllmbox's rates: docs/tuning.md).
- 2.4 us: from 95, 138, 179, 201, 219 and 229 GB/s for cold launches that read 0.25, 1, 2, 4, 8 and 16 MB (InterfaceX,
  docs/RESULTS.md): what they take longer than at 235 GB/s is 1.6 to 3.0 us, 2.4 on average. There is no figure for
  Marlin's start, so it is the same.
- 460 us for host and pair together: flash7777/vllm-marlin-sm12x, TOKEN_TIME_MAP, estimated there for two machines; the
  share of the second one is an H200's.
- 110 TFLOP/s: `mma.sync` with bfloat16 (InterfaceX, docs/ROOFLINE.md).
"""

H200 = Gpu(
    name="H200",
    memory_gb=141,
    gbytes_per_s=4200,
    four_bit_gbytes_per_s=3300,
    one_row_gbytes_per_s=4200,
    kernel_us=2.5,
    packed_us=7.0,
    host_us=286,
    pair_us=102,
    tflops=700,
)
"""Measured by this project (benchmarks/NOTES.md).

- 4200 GB/s: the output head, 622 MB in 148 us, one rank (entry 13's profile).
- 3300 GB/s and 7.0 us: Marlin's kernel for experts by itself, eight tokens and one, gate and up and down, whole and
  half (entry 9's table): 33.1, 20.0, 20.0 and 13.5 us by this line for eight tokens, 32.7, 20.8, 19.7 and 14.2
  measured.
- 2.5 us: norms, routing and attention in the profile of one rank (entry 13): 840 us for 336 kernels.
- 286 and 102 us: steps less kernels, of one rank and of the pair (entry 13).
- 700 TFLOP/s: assumed; no step here comes near it.
"""

H100 = Gpu(
    name="H100",
    memory_gb=80,
    gbytes_per_s=4200 * 3.35 / 4.8,
    four_bit_gbytes_per_s=3300 * 3.35 / 4.8,
    one_row_gbytes_per_s=4200 * 3.35 / 4.8,
    kernel_us=H200.kernel_us,
    packed_us=H200.packed_us,
    host_us=H200.host_us,
    pair_us=H200.pair_us,
    tflops=H200.tflops,
)
"""An H200 with the memory of an H100: 3.35 for 4.8 TB/s (data sheets)."""

GPUS = {gpu.name.lower(): gpu for gpu in (GB10, H100, H200)}
"""By the name of the option --gpu."""


def with_bandwidth(gpu: Gpu, gbytes_per_s: float) -> Gpu:
    """The GPU with a memory of another bandwidth, for all kinds of kernels in proportion."""
    ratio = gbytes_per_s / gpu.gbytes_per_s
    return replace(
        gpu,
        gbytes_per_s=gbytes_per_s,
        four_bit_gbytes_per_s=gpu.four_bit_gbytes_per_s * ratio,
        one_row_gbytes_per_s=gpu.one_row_gbytes_per_s * ratio,
    )
