"""A quantized model whose groups do not fit into halves: the pair says what one rank says that has them whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_spark.models import tiny

from . import prompts
from .hosts import Hosts
from .servers import spark_tp2, stock_tp1

WIDTH, GROUP = 384, 128  # a rank's 192 are a group and a half
# Weights of 4 bits run in 16-bit arithmetic only, in which two ranks' sums are rounded otherwise than one's: long
# answers of a random model part some time. With wrong scales, the first token is wrong.
TOKENS = 3
ARGUMENTS = ("--dtype", "float16")


def cpu_multiplies_4_bits() -> bool:
    """Whether vLLM's CPU build has that kernel on this processor: it is left out where there is no AVX-512."""
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


@pytest.fixture
def tiny_gptq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Qwen3 with weights of 4 bits, symmetric, as GPTQ stores them."""
    import torch
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(tiny, "INTERMEDIATE", WIDTH)
    folder = tiny.make_tiny_model(tmp_path / "tiny-gptq", "dense")
    quantized: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            quantized[name] = weight
            continue
        size_n, size_k = weight.shape
        groups = weight.float().T.contiguous().view(size_k // GROUP, GROUP, size_n)
        scales = (groups.abs().amax(1) / 7).half()
        values = (groups / scales[:, None].float()).round().clamp(-8, 7).long().reshape(size_k, size_n) + 8
        packed = sum(values[place::8] << (4 * place) for place in range(8))
        assert isinstance(packed, torch.Tensor)
        layer = name.removesuffix(".weight")
        quantized[f"{layer}.qweight"] = torch.where(packed >= 2**31, packed - 2**32, packed).int().contiguous()
        quantized[f"{layer}.scales"] = scales.contiguous()
        quantized[f"{layer}.qzeros"] = torch.full((size_k // GROUP, size_n // 8), 0x77777777, dtype=torch.int32)
        quantized[f"{layer}.g_idx"] = (torch.arange(size_k) // GROUP).to(torch.int32)
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    method = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": method}))
    return folder


def test_the_pair_answers_like_one_rank(hosts: Hosts, tiny_gptq: Path) -> None:
    if not cpu_multiplies_4_bits():
        pytest.skip("vLLM's CPU build multiplies weights of 4 bits with AVX-512 alone, which this processor lacks")
    asked = prompts.PROMPTS[:8]
    with stock_tp1(hosts[0], tiny_gptq, ARGUMENTS) as server:
        reference = prompts.greedy_tokens(server.client, asked, max_tokens=TOKENS)
    with spark_tp2(hosts, tiny_gptq, ARGUMENTS) as server:
        assert prompts.greedy_tokens(server.client, asked, max_tokens=TOKENS) == reference
        said = server.leader.output()
    assert (
        f"intermediate_size is {WIDTH}, and the 192 of one rank are not a multiple of the quantization group size 128"
        in said
    )
    assert "for groups of 64" in said
