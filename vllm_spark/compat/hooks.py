"""Functions and methods of vLLM that this project subclasses, overrides or calls, without changing them.

Their fingerprints are known for each supported version of vLLM: after a change the source is reviewed before its new
fingerprint is added here. `vllm_spark.compat.check` compares them with the installed vLLM when `--spark` is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from vllm_spark.compat.patching import Anchor


@dataclasses.dataclass(frozen=True)
class Hook:
    """One function or method, its use here, and its known fingerprints with the vLLM versions that have them."""

    anchor: Anchor
    used_for: str
    fingerprints: Mapping[str, str]


_ALL = "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"

HOOKS: tuple[Hook, ...] = (
    Hook(
        Anchor("vllm.v1.engine.core:EngineCoreProc.run_engine_core"),
        "the stack of an engine that has a process of its own shows it",
        {"6e1a26904205": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.uniproc_executor:UniProcExecutor._init_executor", scope="source"),
        "sets up the worker of either rank",
        {"4e1939978dfb": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.uniproc_executor:UniProcExecutor._distributed_args"),
        "overridden: the rank, and this project's process groups",
        {"dc6caae11a0c": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.uniproc_executor:UniProcExecutor.collective_rpc"),
        "overridden: both ranks",
        {"2c1ee1e7d30b": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.uniproc_executor:UniProcExecutor.execute_model", scope="source"),
        "goes through collective_rpc",
        {"7246ab975a83": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.uniproc_executor:UniProcExecutor.sample_tokens", scope="source"),
        "goes through collective_rpc",
        {"f8dc4b313344": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.uniproc_executor:UniProcExecutor.take_draft_token_ids", scope="source"),
        "goes through collective_rpc",
        {"074a20a6f6d2": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.abstract:Executor.__init__"),
        "the follower makes its executor of the configuration alone",
        {"af143a79e0dd": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.abstract:Executor.determine_available_memory", scope="source"),
        "goes through collective_rpc, and vLLM takes the smaller of both ranks' answers",
        {"689d3483f0ac": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.abstract:Executor.register_failure_callback"),
        "overridden: called when the pair breaks",
        {"596ca1f3e920": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.abstract:Executor.check_health"),
        "overridden",
        {"1c5958cbd5b3": _ALL},
    ),
    Hook(Anchor("vllm.v1.executor.abstract:Executor.shutdown"), "overridden", {"6fb327c66470": _ALL}),
    Hook(
        Anchor("vllm.v1.serial_utils:run_method", scope="source"),
        "runs a worker call on either rank",
        {"e24e183f58f5": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0", "35f26b9ddeb8": "0.31.0, 0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor("vllm.v1.outputs:AsyncModelRunnerOutput.get_output"),
        "a step's tokens that are still on the device",
        {"4266e8ed0cce": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config", scope="source"),
        "takes the configuration of the worker's global rank",
        {"634bfe9e2b78": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.worker.worker_base:WorkerWrapperBase.execute_model", scope="source"),
        "changes its argument in place, so calls are sent before they run",
        {"5e0e6a748b71": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.core.sched.scheduler:Scheduler.get_grammar_bitmask"),
        "None without structured output: then sampling is announced with the step",
        {"8993360a47de": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.engine.core:EngineCore.step", scope="source"),
        "samples if and only if executing returned None",
        {"48f3b15c126e": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0, 0.31.0", "aa36099315db": "0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor("vllm.platforms.interface:Platform.get_device_communicator_cls"),
        "overridden: this project's communicators",
        {"59ed31d08242": _ALL},
    ),
    Hook(
        Anchor("vllm.platforms.interface:Platform.use_custom_op_collectives"),
        "overridden: collectives are opaque to compilers",
        {"dad321813cb7": _ALL},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator.all_reduce", scope="source"),
        "the fallback; reduces in place",
        {"f12371b631dc": _ALL},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator.all_gather"),
        "the fallback",
        {"0d6f7fc226ff": _ALL},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator.gather"),
        "the fallback",
        {"aad4714c11ac": _ALL},
    ),
    Hook(
        Anchor(
            "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator._all_group_ranks_share_shm_group_name"
        ),
        "overridden: the ranks are on two hosts",
        {"7ae15f3070e0": _ALL},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.cuda_communicator:CudaCommunicator.all_reduce"),
        "the fallback",
        {"cd0c96c67410": "0.26.0, 0.27.0, 0.28.0", "2d4913032f3c": "0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.cuda_communicator:CudaCommunicator.all_gather"),
        "the fallback",
        {"1c9bd883d42d": _ALL},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.base_device_communicator:DeviceCommunicatorBase.reduce_scatter"),
        "counted and passed on",
        {"7e51a6d43576": _ALL},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.base_device_communicator:DeviceCommunicatorBase.broadcast"),
        "counted and passed on",
        {"9d7bcb49a0c6": _ALL},
    ),
    Hook(
        Anchor("vllm.v1.executor.abstract:Executor.add_lora", scope="source"),
        "goes through collective_rpc, where the adapter is compared",
        {"7de00a9c2cd1": _ALL},
    ),
    Hook(
        Anchor("vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter", scope="source"),
        "when an adapter's files are read: what is in memory and not to be loaded in place is not",
        {
            "83aa6fbaaa21": "0.26.0, 0.27.0",
            "e4492f871d5e": "0.28.0, 0.29.0, 0.30.0, 0.31.0, 0.32.0, 0.33.0",
        },
    ),
    Hook(
        Anchor("vllm.lora.utils:get_adapter_absolute_path", scope="source"),
        "where a rank finds an adapter",
        {
            "3b8144260976": "0.26.0, 0.27.0, 0.28.0, 0.29.0, 0.30.0",
            "77439c26a595": "0.31.0, 0.32.0, 0.33.0",
        },
    ),
    Hook(
        Anchor("vllm.model_executor.model_loader.base_loader:BaseModelLoader.download_model", scope="source"),
        "downloads a model on the leader",
        {"a07d772a8a77": _ALL},
    ),
)
