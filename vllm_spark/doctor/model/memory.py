"""The check whether one machine has the memory for its half of a model."""

from __future__ import annotations

import re

from vllm_spark.compat.versions import is_cpu_build
from vllm_spark.config.settings import SparkConfig, flag_name
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.gpu.reading import Gpu
from vllm_spark.doctor.model.question import ModelQuestion
from vllm_spark.doctor.system import System
from vllm_spark.errors import upper_first
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.memory.need import refusal
from vllm_spark.memory.scopes import MACHINE, Scope, container_memory, gib, read_scopes

_ID, _TITLE = "model.memory", "Memory for its half"
_ROUND = 1024  # tokens to which a suggested length is rounded down


def check_memory(system: System, config: SparkConfig, question: ModelQuestion, chip: Gpu | None) -> Finding:
    """Whether weights, overhead and the longest sequence fit, beside what the settings leave to the desktop.

    Args:
        system: the machine.
        config: its settings.
        question: the model, and what a rank of it allocates.
        chip: the machine's GPU, whose own memory counts if it has one.
    """
    need = question.need
    if not need.weights:
        return Finding(_ID, _TITLE, "unknown", "", "The bytes of its weights are not known; give its folder.")
    if chip is None and not is_cpu_build():
        return Finding(_ID, _TITLE, "not applicable", "", "This machine has no GPU, and its vLLM is no CPU build.")
    if chip is not None and chip.memory:
        scopes, memory, reserve = [Scope("this GPU", chip.memory, chip.memory)], chip.memory, 0
    else:
        scopes = read_scopes() if system.live else _from_files(system)
        memory = container_memory() if system.live and is_cpu_build() else scopes[0].total
        reserve = config.reserved_bytes(unified=chip is not None)
    scope = min(scopes, key=lambda each: each.available - each.reserve_of(reserve))
    left = scope.available - scope.reserve_of(reserve) - need.weights - need.graphs - need.region
    sentence = refusal(need, scopes, memory, reserve, host_name(), flag_name("reserve_memory"))
    cache = min(need.kv_cache_of(memory), max(0, left))
    parts = (
        f"weights {gib(need.weights)}, graphs and activations {gib(need.graphs)}, kept free "
        f"{gib(scope.reserve_of(reserve))} of {gib(scope.available)} GiB available"
    )
    if left <= 0:
        return Finding(
            _ID,
            _TITLE,
            "problem",
            parts,
            f"{upper_first((sentence or '').partition('; ')[0])}." if sentence else "Nothing is left for a KV cache.",
            "ps -eo rss,pid,args --sort=-rss | head   # end the largest, or choose a smaller model or fewer bits"
            if left + scope.total - scope.available > 0
            else f"vllm-spark estimate {question.name}   # the sum; take a smaller model or fewer bits a weight",
        )
    room = _room(cache, question)
    value = f"{parts}, so a KV cache of {gib(cache)}{'' if room is None else f': {room:,} tokens'}"
    serve = f"vllm serve {question.name} --spark"
    share = re.search(r"--gpu-memory-utilization [\d.]+", sentence or "")
    if room is not None and question.longest and room < question.longest:
        shorter = f" --max-model-len {max(1, room - room % _ROUND if room >= _ROUND else room)}"
        return Finding(
            _ID,
            _TITLE,
            "warning",
            value,
            f"vLLM refuses a start whose KV cache does not hold the longest sequence, of {question.longest:,} tokens.",
            serve + (f" {share[0]}" if share else "") + shorter,
        )
    if sentence is None:
        return Finding(_ID, _TITLE, "ok", value)
    return Finding(
        _ID,
        _TITLE,
        "note",
        value,
        f"{upper_first(sentence.partition('; ')[0])}: with vLLM's default share a start is refused.",
        serve + (f" {share[0]}" if share else f" --kv-cache-memory-bytes {cache}"),
    )


def _room(cache: int, question: ModelQuestion) -> int | None:
    """Tokens that a KV cache holds; None if the model keeps nothing for each token, or that is not known."""
    return cache // question.token_bytes if question.token_bytes else None


def _from_files(system: System) -> list[Scope]:
    """The machine's memory by a copy of its /proc/meminfo."""
    text = system.text("proc/meminfo") or ""
    found = {name: int(kib) << 10 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return [Scope(MACHINE, found.get("MemTotal", 0), found.get("MemAvailable", 0))]
