"""This rank's counters: of its runtime, its steps and its fallbacks."""

from __future__ import annotations

from vllm_spark.backend.status import RankCounters
from vllm_spark.collective import fallbacks, installed

_RUNTIME_COUNTERS = (
    *("all_reduces", "all_gathers", "all_reduce_bytes", "all_gather_bytes", "wait_seconds"),
    *("packet_messages", "payload_messages", "chunked_operations", "proxy_posts"),
    *("rails_up", "rail_failures", "rail_recoveries", "rail_proof_failures", "reposts"),
)


def local_counters(rank: int, token_digest: tuple[int, bytes]) -> RankCounters:
    """This process's counters.

    Args:
        rank: this process's.
        token_digest: steps so far, and the digest of what they sampled and drafted.
    """
    counters = RankCounters(rank, steps=token_digest[0], digest=token_digest[1].hex(), fallbacks=fallbacks())
    if runtime := installed():
        runs = runtime.counters()
        for name in _RUNTIME_COUNTERS:
            setattr(counters, name, getattr(runs, name))
        rails = slice(len(runs.rail_states))
        counters.rail_posts = runs.rail_posts[rails]
        counters.rail_bytes = runs.rail_bytes[rails]
        counters.rail_doorbells = runs.rail_doorbells[rails]
        counters.rails_held_down = runs.rail_states.count("held down")
    return counters
