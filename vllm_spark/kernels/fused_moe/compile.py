"""Compiles vLLM's FusedMoE kernels for a GPU, which need not be present, and reports their use of its resources.

The kernels' functions are extracted from vLLM's source file, since importing that on a machine without a GPU replaces
Triton by a placeholder. Triton compiles for any NVIDIA GPU on any machine; its wheel contains the assembler.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import linecache
import re
import subprocess
import tempfile
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spark.errors import SparkError, first_line
from vllm_spark.kernels.fused_moe.table import FusedMoeShape
from vllm_spark.models.weights import Int4

_SOURCE = Path("model_executor", "layers", "fused_moe", "fused_moe.py")
_KERNELS = ("write_zeros_to_output", "fused_moe_kernel_gptq_awq", "fused_moe_kernel")
_TIMEOUT_SECONDS = 300.0

INT4 = Int4(128)
"""The int4 format that kernels are compiled for by default: the name of a table does not contain it."""


class CompileError(SparkError):
    """A kernel that Triton or the assembler refuses."""


@dataclass(frozen=True)
class Compiled:
    """Resources that a kernel uses.

    Attributes:
        shared_bytes: of shared memory, for one block.
        registers: of a thread.
        spilled_bytes: of registers that each thread stores to memory, since it has too few.
    """

    shared_bytes: int
    registers: int
    spilled_bytes: int


def unavailable() -> str | None:
    """Why kernels cannot be compiled here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if kernel_source() is None:
        return "vLLM, whose kernels are compiled, is not installed (pip install vllm)"
    return None


def triton_version() -> str:
    """Version of the installed Triton, whatever its distribution's name."""
    import triton

    return str(triton.__version__)


@functools.cache
def kernel_source() -> Path | None:
    """vLLM's file with the kernels; None if it is not installed. vLLM is not imported."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / _SOURCE).is_file():
            return path
    return None


def compile_row(
    shape: FusedMoeShape,
    row: Mapping[str, int],
    capability: tuple[int, int],
    source: Path | None = None,
    int4: Int4 = INT4,
) -> Compiled:
    """Compiles the kernels that a row of a table selects: gate and up, and down with the router's weights.

    Without sorting, vLLM uses another variant (`naive_block_assignment`): for small steps, where tokens * top_k * 4 is
    at most the number of experts (128 experts, top 8: up to 4 tokens), except with 4-bit and 8-bit integers. So both
    variants are compiled.

    Args:
        shape: of the table.
        row: `BLOCK_SIZE_M` and so on, all that the kernel needs.
        capability: of the GPU, (12, 1) for GB10.
        source: vLLM's `fused_moe.py`; the installed one's if it is None.
        int4: how 4-bit weights are stored.

    Returns:
        The largest of what they take.

    Raises:
        CompileError: the kernel does not compile, or takes arguments that are not known here.
    """
    path = source or kernel_source()
    if path is None:
        raise CompileError("vLLM, whose kernels are compiled, is not installed; install it (pip install vllm)")
    size = shape.block_shape
    k = row["BLOCK_SIZE_K"] if size is None else min(row["BLOCK_SIZE_K"], *size)
    row = {"SPLIT_K": 1, "num_warps": 4, "num_stages": 3, **row, "BLOCK_SIZE_K": k}
    # The code does not depend on the numbers of experts and tokens, so shapes share compiled kernels.
    packed = shape.dtype in ("int4_w4a16", "int8_w8a16")
    kind = _Kind(shape.dtype, size, int4 if shape.dtype == "int4_w4a16" else INT4)
    values = tuple(sorted(row.items()))
    each = [
        _compile(path, kind, values, capability, routed, unsorted)
        for routed in (False, True)
        for unsorted in ((False,) if packed else (False, True))
    ]
    return Compiled(
        max(one.shared_bytes for one in each),
        max(one.registers for one in each),
        max(one.spilled_bytes for one in each),
    )


@dataclass(frozen=True)
class _Kind:
    dtype: str | None
    block: tuple[int, int] | None
    int4: Int4


@functools.cache
def _compile(
    path: Path,
    kind: _Kind,
    row: tuple[tuple[str, int], ...],
    capability: tuple[int, int],
    routed: bool,
    unsorted: bool,
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(row)
    options = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    dtype = kind.dtype
    name = "fused_moe_kernel_gptq_awq" if dtype == "int4_w4a16" else "fused_moe_kernel"
    function = getattr(_kernels(path), name)
    constants, pointers = _constants(kind, triton.language.bfloat16, routed, unsorted), _pointers(dtype)
    constants |= values
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(function.arg_names):
        if parameter in constants:
            signature[parameter] = "constexpr"
        elif parameter in pointers:
            signature[parameter] = pointers[parameter]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter in _SCALARS or parameter.startswith("stride_"):
            signature[parameter] = "i32"
            if parameter in _ALIGNED:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            raise CompileError(
                f"vLLM's {name} in {path} takes {parameter}, which vllm_spark does not know; use a "
                "supported version of vLLM"
            )
    used = {key: value for key, value in constants.items() if key in signature}
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Triton's future defaults
            result = triton.compile(ASTSource(function, signature, used, attributes), target=target, options=options)
    except Exception as error:  # Triton raises whatever its passes raise
        raise CompileError(f"Triton refuses {_words(values | options)}: {first_line(error)}") from None
    registers, spilled = _assemble(result.asm["ptx"])
    return Compiled(result.metadata.shared, registers, spilled)


_SCALARS = ("N", "K", "EM", "num_valid_tokens")
_ALIGNED = (
    "N",
    "K",
    "EM",
    "stride_am",
    "stride_be",
    "stride_bn",
    "stride_cm",
    "stride_bse",
)  # multiples of 16 for every model here; Triton specializes kernels on that when it runs them


def _pointers(dtype: str | None) -> dict[str, str]:
    data = {
        "fp8_w8a8": ("*fp8e4nv", "*fp8e4nv"),
        "int8_w8a8": ("*i8", "*i8"),
        "int4_w4a16": ("*bf16", "*u8"),
        "int8_w8a16": ("*bf16", "*i8"),
    }
    inputs, weights = data.get(dtype or "", ("*bf16", "*bf16"))
    scales = "*bf16" if dtype in ("int4_w4a16", "int8_w8a16") else "*fp32"
    return {
        "a_ptr": inputs,
        "b_ptr": weights,
        "c_ptr": "*bf16",
        "b_bias_ptr": "*bf16",
        "a_scale_ptr": "*fp32",
        "b_scale_ptr": scales,
        "b_zp_ptr": "*u8",
        "topk_weights_ptr": "*fp32",
        "sorted_token_ids_ptr": "*i32",
        "expert_ids_ptr": "*i32",
        "num_tokens_post_padded_ptr": "*i32",
    }


def _constants(kind: _Kind, compute: Any, routed: bool, unsorted: bool) -> dict[str, Any]:
    """As vLLM passes them in a decode step; a stride of 1 is a constant to Triton too."""
    dtype, block = kind.dtype, kind.block
    return {
        "stride_ak": 1,
        "stride_bk": 1,
        "stride_cn": 1,
        "group_n": block[0] if block else 0,
        "group_k": block[1] if block else 0,
        "naive_block_assignment": unsorted,
        "MUL_ROUTED_WEIGHT": routed,
        "top_k": 1 if routed else 8,
        "compute_type": compute,
        "use_fp8_w8a8": dtype == "fp8_w8a8",
        "use_int8_w8a8": dtype == "int8_w8a8",
        "use_int8_w8a16": dtype == "int8_w8a16",
        "use_int4_w4a16": dtype == "int4_w4a16",
        "per_channel_quant": dtype in ("fp8_w8a8", "int8_w8a8") and block is None,
        "HAS_BIAS": False,
        "SWAP_AB": False,
        "USE_TD": False,
        "block_k_diviable": True,
        "group_size": kind.int4.group_size,
        "has_zp": kind.int4.zero_points,
        **({"N": 1024, "K": 2048} if dtype == "int4_w4a16" else {}),
    }


@functools.cache
def _kernels(path: Path) -> types.ModuleType:
    """A module with only the kernels of vLLM's file; Triton reads their source through `linecache`."""
    text = path.read_text(encoding="utf-8")
    wanted = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name in _KERNELS]
    if {node.name for node in wanted} != set(_KERNELS):
        raise CompileError(
            f"{path} does not have the kernels {', '.join(_KERNELS)}; this version of vLLM is not supported"
        )
    lines = text.splitlines(keepends=True)
    parts = ["import triton\nimport triton.language as tl\n"]
    for node in wanted:
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        parts.append("\n\n" + "".join(lines[first - 1 : node.end_lineno]))
    source = "".join(parts)
    name = f"<kernels of {path}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    module = types.ModuleType("vllm_spark_fused_moe_kernels")
    module.__file__ = name
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers of a thread and the bytes that it spills, as the assembler reports them."""
    found = re.search(r"^\.target\s+(\S+)", ptx, re.MULTILINE)
    architecture = found[1].rstrip(",") if found else "sm_121a"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        command = [str(_assembler()), "-v", f"--gpu-name={architecture}", str(source), "-o", str(Path(folder, "out"))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise CompileError(f"the assembler took more than {_TIMEOUT_SECONDS:g} s for a kernel") from None
    if done.returncode:
        raise CompileError(f"the assembler refuses a kernel: {first_line(done.stderr)}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    if registers is None or not spills:
        raise CompileError(f"the assembler did not print a kernel's registers: {first_line(done.stderr)}")
    return int(registers[1]), max(spills)


@functools.cache
def _assembler() -> Path:
    """The assembler in Triton's wheel; the one for Blackwell if there is one."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for name in ("ptxas-blackwell", "ptxas"):
        if (path := folder / name).is_file():
            return path
    raise CompileError(
        f"there is no ptxas in {folder}; reinstall Triton's wheel (pip install --force-reinstall triton)"
    )


def _words(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
