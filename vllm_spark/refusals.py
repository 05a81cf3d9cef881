"""What a pair does not do, and what vLLM does not take, each in one sentence."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any

from vllm_spark.config import FLAG
from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.ranks import WORLD_SIZE

logger = logging.getLogger("vllm_spark")

EXECUTOR = "vllm_spark.executor.SparkExecutor"


def refuse_what_a_pair_cannot_do(engine_args: Any) -> None:
    """Raises ConfigurationError, with the flag and its value, for anything but two tensor-parallel ranks."""
    refusals = (
        ("tensor_parallel_size", (1, WORLD_SIZE), "a pair has exactly two ranks; leave it out"),
        ("pipeline_parallel_size", (1,), "a pair splits every layer, not the stack of layers; leave it out"),
        ("data_parallel_size", (1,), "a pair serves one copy of the model; leave it out"),
        ("data_parallel_rank", (None,), "a pair serves one copy of the model; leave it out"),
        ("data_parallel_start_rank", (None,), "a pair serves one copy of the model; leave it out"),
        ("nnodes", (1,), "the pair is formed by vllm-spark join; leave it out"),
        ("node_rank", (0,), "the pair is formed by vllm-spark join; leave it out"),
        ("decode_context_parallel_size", (1,), "a pair has only its two tensor-parallel ranks; leave it out"),
        ("prefill_context_parallel_size", (1,), "a pair has only its two tensor-parallel ranks; leave it out"),
        ("kv_transfer_config", (None,), "KV connectors need vLLM's own executors; leave it out"),
        ("ec_transfer_config", (None,), "encoder-cache connectors need vLLM's own executors; leave it out"),
        ("distributed_executor_backend", (None, EXECUTOR), "--spark brings an executor of its own; leave it out"),
        ("mm_processor_cache_type", (None, "lru"), "a shared-memory cache does not reach the other machine; use lru"),
    )
    for field, allowed, remedy in refusals:
        value = getattr(engine_args, field, allowed[0])
        if value not in allowed:
            shown = getattr(value, "kv_connector", None) or getattr(value, "ec_connector", None) or value
            raise ConfigurationError(f"--{field.replace('_', '-')} {shown} does not go with {FLAG}: {remedy}")
    world_size = os.environ.get("WORLD_SIZE")
    if world_size not in (None, "", "1", str(WORLD_SIZE)):
        raise ConfigurationError(
            f"WORLD_SIZE is {world_size}, and a pair has {WORLD_SIZE} ranks; launch one process on each of two machines"
        )


def refuse_indivisible_shards(vllm_config: Any) -> None:
    """Raises ConfigurationError if the model cannot be cut into two equal halves."""
    model = vllm_config.model_config.hf_text_config
    dimensions = ["num_attention_heads", "intermediate_size", "moe_intermediate_size"]
    if vllm_config.parallel_config.enable_expert_parallel:
        dimensions += ["num_experts", "n_routed_experts", "num_local_experts"]
    for dimension in dimensions:
        size = getattr(model, dimension, None)
        if isinstance(size, int) and size % WORLD_SIZE:
            raise ConfigurationError(_indivisible(f"{dimension} is {size}"))
    heads = getattr(model, "num_key_value_heads", None)
    if isinstance(heads, int) and heads > 1 and heads % WORLD_SIZE:  # a single one is on both ranks
        raise ConfigurationError(_indivisible(f"num_key_value_heads is {heads}"))


def refuse_fp8_inputs_of_marlin(capability: Callable[[], tuple[int, int] | None]) -> None:
    """Raises ConfigurationError if Marlin is to work on inputs of 8 bits on a GPU where its output is wrong then.

    Args:
        capability: asks for the GPU's compute capability; None if there is none.
    """
    value = os.environ.get("VLLM_MARLIN_INPUT_DTYPE", "")
    if value.strip().lower() == "fp8" and capability() == (12, 1):
        raise ConfigurationError(
            f"VLLM_MARLIN_INPUT_DTYPE is {value}, which corrupts output on a GB10 (compute capability 12.1, vLLM issue "
            "49546); leave it unset"
        )


@contextlib.contextmanager
def vllms_objections(model: Any) -> Iterator[None]:
    """Turns what vLLM raises for arguments that it does not take into one sentence.

    Raises:
        ConfigurationError: in place of a ValueError (pydantic's included), an OSError (a model that is not there) or an
            ImportError (an optional package of vLLM's, such as one that reads object storage).
    """
    try:
        yield
    except SparkError:
        raise
    except ImportError as error:
        logger.debug("vLLM's own words:", exc_info=error)
        raise ConfigurationError(
            f"vLLM needs a package that it cannot import here ({_first_objection(error).rstrip('.')}); install it into "
            "the environment of vLLM on both machines"
        ) from error
    except (ValueError, OSError) as error:
        logger.debug("vLLM's own words:", exc_info=error)
        objection = _first_objection(error)
        if "divisible" in objection:
            raise ConfigurationError(_indivisible(objection)) from error
        if isinstance(error, OSError) or type(error).__module__.startswith("huggingface_hub"):
            raise ConfigurationError(_model_not_found(str(model), objection)) from error
        raise ConfigurationError(f"{objection.rstrip('.')} (VLLM_LOGGING_LEVEL=DEBUG shows where)") from error


_ADAPTER_REFUSAL = re.compile(r"the adapter .*? cannot be loaded on both machines: .*", re.DOTALL)


def adapter_refusal(name: str, reason: str) -> str:
    """The sentence for an adapter that the follower does not have, or has with other content."""
    return f"the adapter {name} cannot be loaded on both machines: {reason}"


def adapter_refusal_in(text: str) -> str | None:
    """The sentence of `adapter_refusal` in what vLLM made of it, without a full stop; None if there is none."""
    found = _ADAPTER_REFUSAL.search(text)
    return None if found is None else found.group().rstrip(".")


def _indivisible(what: str) -> str:
    return f"this model cannot be cut into two equal halves ({what.rstrip('.')}); serve it without {FLAG}"


def _first_objection(error: Exception) -> str:
    """The first line of what vLLM complains about; pydantic wraps it in three."""
    if callable(errors := getattr(error, "errors", None)):
        first = errors()[0]
        text, field = str(first["msg"]).removeprefix("Value error, "), first["loc"]
        text = f"{'.'.join(map(str, field))}: {text}" if field else text
    else:
        text = str(error) or type(error).__name__
    return text.strip().splitlines()[0]


def _model_not_found(model: str, objection: str) -> str:
    sentence = f"the model {model} cannot be loaded ({objection.rstrip('.')})"
    if not model.startswith(("/", ".", "~")) and model.count("/") <= 1:
        return sentence  # a name on the hub, or a folder here
    try:
        mode = os.stat(model).st_mode
    except PermissionError as error:
        return f"the model {model} cannot be read ({error.strerror}); let the user that serves it read it"
    except (OSError, ValueError):
        return f"there is no folder {model}; give a model's folder, or its name on the hub"
    if stat.S_ISDIR(mode):
        return sentence
    return f"the single file {model} cannot be loaded as a model by this vLLM ({objection.rstrip('.')}); give a folder"
