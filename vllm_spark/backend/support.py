"""Checks that a pair supports vLLM's arguments and configuration, and sentences for the errors that vLLM raises."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from vllm_spark.config.settings import FLAG
from vllm_spark.errors import ConfigurationError, SparkError, without_stop
from vllm_spark.ranks import WORLD_SIZE

logger = logging.getLogger("vllm_spark")

EXECUTOR = "vllm_spark.executor.SparkExecutor"

_TWO_RANKS = "a pair has exactly two tensor-parallel ranks; leave it out, in the environment too"
_ONE_COPY = "a pair serves one copy of the model; leave it out"
_NO_KV_CONNECTORS = "KV connectors need vLLM's own executors; leave it out"
_NO_MICROBATCHES = "microbatches overlap transfers between copies of the model, and a pair has one copy; leave it out"


def check_supported(engine_args: Any) -> None:
    """Raises ConfigurationError, with flag and value, if vLLM's arguments need more than two tensor-parallel ranks."""
    refusals = (
        ("tensor_parallel_size", (1, WORLD_SIZE), "a pair has exactly two ranks; leave it out"),
        ("pipeline_parallel_size", (1,), "a pair splits every layer, not the stack of layers; leave it out"),
        ("data_parallel_size", (1,), _ONE_COPY),
        ("data_parallel_size_local", (None, 1), _ONE_COPY),
        ("data_parallel_rank", (None,), _ONE_COPY),
        ("data_parallel_start_rank", (None,), _ONE_COPY),
        ("data_parallel_hybrid_lb", (False,), _ONE_COPY),
        ("data_parallel_external_lb", (False,), _ONE_COPY),
        ("nnodes", (1,), "the pair is formed by vllm-spark join; leave it out"),
        ("node_rank", (0,), "the pair is formed by vllm-spark join; leave it out"),
        ("decode_context_parallel_size", (1,), "a pair has only its two tensor-parallel ranks; leave it out"),
        ("prefill_context_parallel_size", (1,), "a pair has only its two tensor-parallel ranks; leave it out"),
        ("enable_dbo", (False,), _NO_MICROBATCHES),
        ("ubatch_size", (0, 1), _NO_MICROBATCHES),
        ("enable_elastic_ep", (False,), _ONE_COPY),
        ("enable_fault_tolerance", (False,), _ONE_COPY),
        ("kv_transfer_config", (None,), _NO_KV_CONNECTORS),
        ("kv_offloading_size", (None,), _NO_KV_CONNECTORS),
        ("ec_transfer_config", (None,), "encoder-cache connectors need vLLM's own executors; leave it out"),
        ("distributed_executor_backend", (None, EXECUTOR), "--spark brings an executor of its own; leave it out"),
        ("mm_processor_cache_type", (None, "lru"), "a shared-memory cache does not reach the other machine; use lru"),
    )
    for field, allowed, remedy in refusals:
        value = getattr(engine_args, field, allowed[0])
        if value not in allowed:
            shown = getattr(value, "kv_connector", None) or getattr(value, "ec_connector", None) or value
            typed = f"--{field.replace('_', '-')}" if value is True else f"--{field.replace('_', '-')} {shown}"
            raise ConfigurationError(f"{typed} cannot be used with {FLAG}: {remedy}")
    world_size = os.environ.get("WORLD_SIZE")
    if world_size not in (None, "", "1", str(WORLD_SIZE)):
        raise ConfigurationError(
            f"WORLD_SIZE is {world_size}, and a pair has {WORLD_SIZE} ranks; launch one process on each of two machines"
        )


_FUSING_PASSES = ("fuse_allreduce_rms", "enable_sp", "fuse_gemm_comms")
"""Compiler passes of vLLM that replace collectives by fused ones, which work only between GPUs of one machine. Some
versions turn them on by default, if FlashInfer is installed or a model is dense."""


def disable_fused_collectives(engine_args: Any) -> None:
    """Turns off vLLM's compiler passes that bypass this project's collectives.

    Raises:
        ConfigurationError: one of them was requested.
    """
    passes = getattr(getattr(engine_args, "compilation_config", None), "pass_config", None)
    for name in _FUSING_PASSES:
        if not hasattr(passes, name):
            continue  # a pass of another version, or no configuration
        if getattr(passes, name):
            raise ConfigurationError(
                f"--compilation-config.pass_config.{name} cannot be used with {FLAG}: its collectives work only within "
                "one machine; leave it out"
            )
        setattr(passes, name, False)


_CHECKS: tuple[tuple[str, str, tuple[Any, ...], str], ...] = (
    ("parallel_config.tensor_parallel_size", "--tensor-parallel-size", (WORLD_SIZE,), _TWO_RANKS),
    ("parallel_config.pipeline_parallel_size", "--pipeline-parallel-size", (1,), _TWO_RANKS),
    ("parallel_config.data_parallel_size", "--data-parallel-size (or VLLM_DP_SIZE)", (1,), _TWO_RANKS),
    ("parallel_config.decode_context_parallel_size", "--decode-context-parallel-size", (1,), _TWO_RANKS),
    ("parallel_config.prefill_context_parallel_size", "--prefill-context-parallel-size", (1,), _TWO_RANKS),
    ("parallel_config.nnodes", "--nnodes", (1,), "the pair is formed by vllm-spark join; leave it out"),
    ("parallel_config.enable_elastic_ep", "--enable-elastic-ep", (False,), _TWO_RANKS),
    ("parallel_config.enable_fault_tolerance", "--enable-fault-tolerance", (False,), _TWO_RANKS),
    (
        "parallel_config.assigned_physical_gpu_ids",
        "--device-ids",
        (None,),
        "each machine has a GPU of its own; set CUDA_VISIBLE_DEVICES on the machine where another one is meant",
    ),
    (
        "parallel_config.distributed_executor_backend",
        "--distributed-executor-backend",
        (EXECUTOR,),
        "--spark brings an executor of its own; leave it out",
    ),
    (
        "kv_transfer_config.kv_connector",
        "--kv-transfer-config (or --kv-offloading-size)",
        (None,),
        _NO_KV_CONNECTORS,
    ),
    (
        "ec_transfer_config.ec_connector",
        "--ec-transfer-config",
        (None,),
        "encoder-cache connectors need vLLM's own executors; leave it out",
    ),
    (
        "model_config.multimodal_config.mm_processor_cache_type",
        "--mm-processor-cache-type",
        (None, "lru"),
        "a shared-memory cache does not reach the other machine; use lru",
    ),
)
"""Field of vLLM's configuration, its option or variable, the values that a pair supports, and the remedy."""


def check_configuration(vllm_config: Any) -> None:
    """Raises ConfigurationError for unsupported values in the configuration that vLLM created.

    Options are checked earlier too (`check_supported`), before vLLM refuses them with another message or acts on them;
    but vLLM derives some values from others, from the environment, and from files.
    """
    for path, option, allowed, remedy in _CHECKS:
        value = vllm_config
        for name in path.split("."):
            value = getattr(value, name, allowed[0]) if value is not None else None
        if value is not None and value not in allowed:
            raise ConfigurationError(f"{option} {value} cannot be used with {FLAG}: {remedy}")


def check_divisible(vllm_config: Any) -> None:
    """Raises ConfigurationError if the model, or the draft model, cannot be split into two equal halves."""
    experts = vllm_config.parallel_config.enable_expert_parallel
    check_halves(vllm_config.model_config.hf_text_config, experts, "this model")
    draft = getattr(getattr(vllm_config, "speculative_config", None), "draft_model_config", None)
    if draft is not None and draft is not vllm_config.model_config:
        check_halves(draft.hf_text_config, experts, f"the draft model {draft.model}")


def check_halves(model: Any, experts: bool, name: str) -> None:
    """Raises ConfigurationError if heads, widths or experts of a model cannot be split into two equal halves.

    Args:
        model: an object whose attributes are the values of its config.json.
        experts: whether experts are distributed whole (`--enable-expert-parallel`).
        name: of the model, in the sentence.
    """
    dimensions = ["num_attention_heads", "intermediate_size", "moe_intermediate_size"]
    if experts:
        dimensions += ["num_experts", "n_routed_experts", "num_local_experts"]
    for dimension in dimensions:
        size = getattr(model, dimension, None)
        if isinstance(size, int) and size % WORLD_SIZE:
            raise ConfigurationError(_indivisible(f"{dimension} is {size}", name))
    heads = getattr(model, "num_key_value_heads", None)
    if isinstance(heads, int) and heads > 1 and heads % WORLD_SIZE:  # a single one is replicated
        raise ConfigurationError(_indivisible(f"num_key_value_heads is {heads}", name))


def check_experts(vllm_config: Any) -> None:
    """Raises ConfigurationError if whole experts are to be distributed over the ranks on CPUs.

    There vLLM gives its kernel the numbers of all experts, but not the map of those that the rank has.
    """
    if (
        vllm_config.parallel_config.enable_expert_parallel
        and vllm_config.device_config.device_type == "cpu"
        and vllm_config.model_config.get_num_experts() > 0
    ):
        raise ConfigurationError(
            f"--enable-expert-parallel cannot be used with {FLAG} on CPUs: there vLLM's kernel for experts ends the "
            "process with SIGSEGV; leave it out, then each rank has half of every expert"
        )


def check_marlin_inputs(capability: Callable[[], tuple[int, int] | None]) -> None:
    """Raises ConfigurationError if Marlin is to use 8-bit inputs on a GPU on which its output is wrong then.

    Args:
        capability: returns the GPU's compute capability; None without a GPU.
    """
    value = os.environ.get("VLLM_MARLIN_INPUT_DTYPE", "")
    if value.strip().lower() == "fp8" and capability() == (12, 1):
        raise ConfigurationError(
            f"VLLM_MARLIN_INPUT_DTYPE is {value}, which corrupts output on a GB10 (compute capability 12.1, vLLM issue "
            "49546); leave it unset"
        )


@contextlib.contextmanager
def user_errors_from_vllm(model: Any, engine_args: Any = None) -> Iterator[None]:
    """Turns vLLM's exceptions for invalid arguments into a ConfigurationError.

    Args:
        model: vLLM's argument `--model`.
        engine_args: its engine arguments, if they exist, in which it puts all settings of speculation together.

    Raises:
        ConfigurationError: in place of a ValueError (pydantic's included), an OSError (no such model), an error of
            huggingface_hub (a file that it cannot get, or invalid values in config.json), a NotImplementedError (a
            method of speculation that does not fit the model), an AssertionError with a message (options that exclude
            each other) or an ImportError (an optional package of vLLM's, such as one that reads object storage).
    """
    try:
        yield
    except SparkError:
        raise
    except ImportError as error:
        logger.debug("vLLM's error:", exc_info=error)
        raise ConfigurationError(
            f"vLLM needs a package that it cannot import here ({_first_line_of(error).rstrip('.')}); install it into "
            "the environment of vLLM on both machines"
        ) from error
    except Exception as error:
        from_hub = type(error).__module__.startswith("huggingface_hub")
        explained = isinstance(error, AssertionError) and str(error)
        if not (isinstance(error, ValueError | OSError | NotImplementedError) or explained or from_hub):
            raise
        logger.debug("vLLM's error:", exc_info=error)
        in_speculation = _is_about_speculation(error)
        speculative = getattr(engine_args, "speculative_config", None) if in_speculation else None
        draft = speculative.get("model") if isinstance(speculative, dict) else None
        raise ConfigurationError(_sentence(error, str(model), draft, in_speculation, from_hub)) from error


def _sentence(error: Exception, model: str, draft: str | None, in_speculation: bool, from_hub: bool) -> str:
    """The sentence for an error of vLLM's.

    Args:
        error: of vLLM's.
        model: the name of the served model.
        draft: the name of the draft model, if the error is about speculation with one.
        in_speculation: whether the error is about speculation.
        from_hub: whether it is an error of huggingface_hub.
    """
    message = _first_line_of(error)
    if "divisible" in message:
        return _indivisible(message, "this model" if draft is None else f"the draft model {draft}")
    if isinstance(error, OSError) or from_hub or (draft is not None and _NOT_FOUND in message):
        return _model_not_found(model if draft is None else draft, message, "model" if draft is None else "draft model")
    if in_speculation:
        message = f"--speculative-config is invalid: {message}"
    return f"{message} (VLLM_LOGGING_LEVEL=DEBUG shows where)"


_NOT_FOUND = "Invalid repository ID or local directory"
"""vLLM's words for a model that is neither on this machine nor on the hub."""

_CREATES_SPECULATION = "create_speculative_config"
"""vLLM's function that makes the configuration of speculation, the draft model's included."""


def _is_about_speculation(error: Exception) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name == _CREATES_SPECULATION for frame, _ in frames)


_ADAPTER_REFUSAL = re.compile(r"the adapter .*? cannot be loaded on both machines: .*", re.DOTALL)


def adapter_refusal(name: str, reason: str) -> str:
    """The sentence for an adapter that the follower does not have, or has with other content."""
    return f"the adapter {name} cannot be loaded on both machines: {reason}"


def adapter_refusal_in(text: str) -> str | None:
    """The sentence of `adapter_refusal` within an error text of vLLM's, without a full stop; None if there is none."""
    found = _ADAPTER_REFUSAL.search(text)
    return None if found is None else found.group().rstrip(".")


def _indivisible(what: str, name: str) -> str:
    remedy = "serve it" if name == "this model" else "use another one, or serve"
    return f"{name} cannot be split into two equal halves ({without_stop(what)}); {remedy} without {FLAG}"


def _first_line_of(error: Exception) -> str:
    """What is specific in an error's message, as one line.

    Left out are pydantic's lines around it, the heading of huggingface_hub's errors, and vLLM's list of all
    architectures.
    """
    if callable(errors := getattr(error, "errors", None)):
        first = errors()[0]
        text, field = str(first["msg"]).removeprefix("Value error, "), first["loc"]
        text = f"{'.'.join(map(str, field))}: {text}" if field else text
    else:
        text = str(error) or type(error).__name__
    lines = text.strip().splitlines()
    line = f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
    return without_stop(line.partition(" Supported architectures:")[0])


def _model_not_found(model: str, message: str, what: str) -> str:
    sentence = f"the {what} {model} cannot be loaded ({message})"
    if not model.startswith(("/", ".", "~")) and model.count("/") <= 1:
        return sentence  # a name on the hub, or a folder here
    try:
        mode = os.stat(model).st_mode
    except PermissionError as error:
        return f"the {what} {model} cannot be read ({error.strerror}); let the user that serves it read it"
    except (OSError, ValueError):
        return f"there is no folder {model}; give a model's folder, or its name on the hub"
    if stat.S_ISDIR(mode):
        return sentence
    return f"the single file {model} cannot be loaded as a model by this vLLM ({message.rstrip('.')}); give a folder"
