"""What is served on two GPUs: a row for each format, and for each architecture that vLLM's CPU build does not serve.

The models are tiny, but each rank's half of a matrix is as large as the kernels of its format ask for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import speculators
from .architectures import ARCHITECTURES, CONTEXT, Architecture
from .formats import FORMATS, quantize_checkpoint
from .random_weights import make_checkpoint

TRITON = ("--attention-backend", "TRITON_ATTN")
TRITON_MLA = ("--attention-backend", "TRITON_MLA")
DELTA_NETS = ("--gdn-prefill-backend", "triton")
PICTURES = ("--mm-encoder-attn-backend", "TORCH_SDPA")
EAGER = ("--enforce-eager",)

WIDE = {
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 2048,
}
WIDE_MOE = Architecture(
    "Qwen3MoeForCausalLM", WIDE | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
)
WIDE_GPT_OSS = Architecture(
    "GptOssForCausalLM",
    WIDE
    | {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
)


@dataclass(frozen=True)
class GpuRow:
    """One model, and how it is served.

    Attributes:
        architecture: its name in the table.
        served: the model that transformers makes, and what is asked of it.
        label: its format in the table.
        form: key of `FORMATS`; empty for bfloat16.
        gpu_arguments: of `vllm serve` on a GPU.
        arguments: of `vllm serve`, on a CPU too.
        drafted: tokens that are drafted in each step; 0 without speculation. Then tokens are drawn, and no other
            server is asked.
        speculation: makes a draft for a model in a folder, and returns the settings of `--speculative-config`.
        make: writes the model, if `served` is not enough.
    """

    architecture: str
    served: Architecture
    label: str = "bfloat16"
    form: str = ""
    gpu_arguments: tuple[str, ...] = (*TRITON, *EAGER)
    arguments: tuple[str, ...] = ()
    drafted: int = 0
    speculation: Callable[[Path, Path], dict[str, object]] | None = None
    make: Callable[[Path], Path] | None = None

    def make_model(self, folder: Path) -> Path:
        """Writes the checkpoint into the new folder, and returns that."""
        if self.make is not None:
            return self.make(folder)
        make_checkpoint(folder, self.served)
        return quantize_checkpoint(folder, FORMATS[self.form]) if self.form else folder

    def serve_arguments(self, device: str, model: Path) -> list[str]:
        """The arguments of `vllm serve` that both servers have; makes the draft."""
        arguments = ["--dtype", "bfloat16", "--no-enable-prefix-caching", "--max-num-seqs", "16", *self.arguments]
        arguments += self.gpu_arguments if device == "cuda" else EAGER
        if self.speculation is not None:
            settings = {"num_speculative_tokens": self.drafted} | self.speculation(model.with_name("draft"), model)
            if device == "cuda" and "model" in settings:
                settings["attention_backend"] = "TRITON_ATTN"
            arguments += ["--speculative-config", json.dumps(settings)]
        return arguments


MOVED_EXPERTS = {"window_size": 8, "step_interval": 32, "use_async": False, "num_redundant_experts": 2}
"""Of `--eplb-config`: some times within the answers, and always at the same steps."""


def _format_rows() -> dict[str, GpuRow]:
    moe = {name: GpuRow("qwen3_moe", WIDE_MOE, form.label, name) for name, form in FORMATS.items() if not form.experts}
    gpt_oss = GpuRow("gpt_oss", WIDE_GPT_OSS, FORMATS["mxfp4"].label, "mxfp4")
    whole = (*TRITON, *EAGER, "--enable-expert-parallel")
    moved = (*whole, "--enable-eplb", "--eplb-config", json.dumps(MOVED_EXPERTS))
    graphs = replace(moe["gptq"], label=f"{moe['gptq'].label}, compiled", gpu_arguments=TRITON)
    return {
        "bfloat16": GpuRow("qwen3_moe", WIDE_MOE),
        **moe,
        "mxfp4": gpt_oss,
        "mxfp4_marlin": replace(
            gpt_oss, label="MXFP4, Marlin", gpu_arguments=(*TRITON, *EAGER, "--moe-backend", "marlin")
        ),
        "fp8_cache": GpuRow("qwen3_moe", WIDE_MOE, "bfloat16, KV cache FP8", arguments=("--kv-cache-dtype", "fp8")),
        "bfloat16_compiled": GpuRow("qwen3_moe", WIDE_MOE, "bfloat16, compiled", gpu_arguments=TRITON),
        "gptq_compiled": graphs,
        "expert_parallel": GpuRow("qwen3_moe", WIDE_MOE, "bfloat16, whole experts", gpu_arguments=whole),
        "gptq_expert_parallel": replace(moe["gptq"], label=f"{moe['gptq'].label}, whole experts", gpu_arguments=whole),
        "moved_experts": GpuRow("qwen3_moe", WIDE_MOE, "bfloat16, experts that are moved", gpu_arguments=moved),
    }


def _ngrams(draft: Path, model: Path) -> dict[str, object]:
    return {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 1}


def _eagle3(draft: Path, model: Path) -> dict[str, object]:
    return {"method": "eagle3", "model": str(speculators.make_eagle3_head(draft, model))}


SAMPLED = GpuRow(
    "qwen3_moe", WIDE_MOE, drafted=3, make=speculators.make_target, gpu_arguments=TRITON, speculation=_ngrams
)

OTHER_ARGUMENTS = {
    "deepseek_v2": TRITON_MLA,
    "deepseek_v3": TRITON_MLA,
    "glm4_moe_lite": TRITON_MLA,
    "kimi_linear": TRITON_MLA,
    "deepseek_v4": ("--kv-cache-dtype", "fp8"),
    "qwen3_next": (*TRITON, *DELTA_NETS),
    "qwen3_5": (*TRITON, *DELTA_NETS, *PICTURES),
    "qwen3_5_moe": (*TRITON, *DELTA_NETS, *PICTURES),
    "qwen3_vl": (*TRITON, *PICTURES),
    "step3p7": (*TRITON, *PICTURES),
    "qwen4_exp": (),
}
"""Arguments for architectures that do not take Triton's attention, or need more."""

ON_GPUS = (
    "minimax_m2",
    "step3p5",
    "mimo_v2_narrow_values",
    "nemotron_h_moe",
    "gpt_oss",
    "qwen3_next",
    "qwen3_5_moe",
    "qwen3_vl",
    "mimo_v2",
    "gemma4",
    "deepseek_v3",
    "kimi_linear",
    "step3p7",
    "deepseek_v4",
    "qwen4_exp",
)
"""All that the CPU build does not serve, and some whose GPU kernels are others."""


def _architecture_row(name: str) -> GpuRow:
    architecture = ARCHITECTURES[name]
    arguments = tuple(
        argument for argument in architecture.arguments if argument not in ("--attention-backend", "CPU_MLA")
    )
    served = replace(architecture, prompt_lengths=ARCHITECTURES["llama"].prompt_lengths)
    return GpuRow(name, served, gpu_arguments=(*OTHER_ARGUMENTS.get(name, TRITON), *EAGER), arguments=arguments)


ROWS: dict[str, GpuRow] = {
    "bfloat16": GpuRow("qwen3_moe", WIDE_MOE),
    "sampled_ngram": SAMPLED,
    "sampled_eagle3": replace(SAMPLED, speculation=_eagle3),
    **_format_rows(),
    **{name: _architecture_row(name) for name in ON_GPUS},
}
"""By name, in the order in which they are begun: the long ones and the formats first."""

MAX_MODEL_LENGTH = 1024
assert MAX_MODEL_LENGTH <= CONTEXT
