"""Collectives between two ranks: one-shot all-reduce and all-gather, in little more than the time of the transfer.

Independent of vLLM. Two processes connect by any means of exchanging a few hundred bytes, and then call the same
collectives in the same order:

    runtime = Runtime.connect(rank, 2, exchange)
    total = runtime.all_reduce(tensor)
    both = runtime.all_gather(tensor, dim=-1)

`DeviceRuntime` in place of `Runtime` is the same for CUDA tensors.
"""

from vllm_spark.collective.cuda_runtime import DeviceRuntime
from vllm_spark.collective.current import count_fallback, fallbacks, install, installed
from vllm_spark.collective.errors import (
    AgreementError,
    CollectiveAbortedError,
    CollectiveError,
    CollectiveTimeoutError,
    MismatchError,
    PoisonedError,
    UsageError,
)
from vllm_spark.collective.link_thread import Announce
from vllm_spark.collective.options import LaunchShape, LoopbackMode, RuntimeOptions, Transport
from vllm_spark.collective.rails import Port, local_ports
from vllm_spark.collective.rendezvous import machine_identity
from vllm_spark.collective.runtime import Counters, OperationRecord, PostRecord, Runtime, RuntimeRecords
from vllm_spark.collective.socket_peer import SocketPeer

__all__ = [
    "AgreementError",
    "Announce",
    "CollectiveAbortedError",
    "CollectiveError",
    "CollectiveTimeoutError",
    "Counters",
    "DeviceRuntime",
    "LaunchShape",
    "LoopbackMode",
    "MismatchError",
    "OperationRecord",
    "PoisonedError",
    "Port",
    "PostRecord",
    "Runtime",
    "RuntimeOptions",
    "RuntimeRecords",
    "SocketPeer",
    "Transport",
    "UsageError",
    "count_fallback",
    "fallbacks",
    "install",
    "installed",
    "local_ports",
    "machine_identity",
]
