"""What this rank has done so far."""

from __future__ import annotations

from vllm_spark.backend.status import RankCounters
from vllm_spark.collective import fallbacks, installed

_OF_RUNTIME = (
    *("all_reduces", "all_gathers", "all_reduce_bytes", "all_gather_bytes", "wait_seconds"),
    *("packet_messages", "payload_messages", "chunked_operations", "proxy_posts"),
    *("rails_up", "rail_failures", "rail_recoveries", "rail_proof_failures", "reposts"),
)


def local_counters(rank: int, ledger: tuple[int, bytes]) -> RankCounters:
    """This process's counters.

    Args:
        rank: this process's.
        ledger: steps so far, and the digest of what they sampled.
    """
    counters = RankCounters(rank, steps=ledger[0], digest=ledger[1].hex(), fallbacks=fallbacks())
    if runtime := installed():
        runs = runtime.counters()
        for name in _OF_RUNTIME:
            setattr(counters, name, getattr(runs, name))
        counters.rails_held_down = runs.rail_states.count("held down")
    return counters
