"""The environment variables that both ranks must have alike.

vLLM chooses kernels, compiler passes and the hub of its models by its variables, some of them while it is imported. So
the leader's travel with its offer, and a follower whose own differ ends its process before it accepts: the next one
starts with the leader's. Variables of other libraries do not travel: a difference is logged.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping

import msgspec

from vllm_spark.processes.known_types import known

logger = logging.getLogger("vllm_spark")

RECORD_VARIABLE = "_SPARK_ENVIRONMENT"
"""In which an engine finds the environment that its user had given: vLLM adds variables of its own to it."""

_PREFIX = "VLLM_"

_LOCAL_NAMES = frozenset(
    {
        # The follower loads from folders, whatever they were downloaded from, and need not have that library.
        "VLLM_USE_MODELSCOPE",
        # Of a process, or of how it starts others.
        "VLLM_CONFIGURE_LOGGING",
        "VLLM_DIST_IDENT",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_LOGGING_COLOR",
        "VLLM_LOGGING_PREFIX",
        "VLLM_LOGGING_STREAM",
        "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
        "VLLM_PLUGINS",
        "VLLM_PROCESS_NAME_PREFIX",
        "VLLM_WORKER_MULTIPROC_METHOD",
        # Files and folders whose names do not end as `_LOCAL_ENDINGS`.
        "VLLM_ASSETS_CACHE",
        "VLLM_MEDIA_CACHE",
        # Hardware.
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_GPU_NIC_PCIE_MAPPING",
        "VLLM_NIC_SELECTION_VARS",
        # Of the API server alone, and what its user tells the project vLLM.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_API_KEY",
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
        "VLLM_DO_NOT_TRACK",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE",
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
        "VLLM_LOG_STATS_INTERVAL",
        "VLLM_NO_USAGE_STATS",
        "VLLM_SERVER_DEV_MODE",
        "VLLM_USAGE_SOURCE",
        "VLLM_USAGE_STATS_SERVER",
    }
)
_LOCAL_ENDINGS = ("_DIR", "_FILE", "_FOLDER", "_HOST", "_IP", "_IPS", "_PATH", "_PORT", "_ROOT")
"""Names of vLLM's variables that hold files, folders or addresses end so."""

_OWN_STAYS = frozenset({"VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_NUM_OF_RESERVED_CPU"})
"""What a machine has room for: the leader's value counts where the follower has none of its own."""

_COMPARED_PREFIXES = (
    "CUBLAS",
    "CUDA_",
    "CUDNN_",
    "FLASHINFER_",
    "FLASH_ATTENTION_",
    "NCCL_",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
)
_COMPARED_NAMES = frozenset({"NVIDIA_TF32_OVERRIDE"})
_UNCOMPARED_NAMES = frozenset(
    {
        "CUDA_DEVICE_ORDER",
        "CUDA_MPS_LOG_DIRECTORY",
        "CUDA_MPS_PIPE_DIRECTORY",
        "CUDA_VISIBLE_DEVICES",
        "NCCL_IB_HCA",
        "NCCL_IB_GID_INDEX",
        "NCCL_SOCKET_IFNAME",
        "TORCH_LOGS",
        "TORCH_TRACE",
    }
)
_UNCOMPARED_PREFIXES = ("NCCL_DEBUG", "TORCHELASTIC_")
_UNCOMPARED_ENDINGS = (*_LOCAL_ENDINGS, "_CACHE", "_HOME", "_VERSION")
"""Versions are compared by asking the libraries."""


class Environment(msgspec.Struct, frozen=True):
    """A leader's variables, as JSON can carry them: values that are not text too.

    Attributes:
        travelling: those that its follower must have.
        compared: those of other libraries.
    """

    travelling: dict[str, str] = {}
    compared: dict[str, str] = {}

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Environment:
        """What matters of `environment`, which is as `os.environ`."""
        return cls(
            {name: _encoded(value) for name, value in environment.items() if travels(name)},
            {name: _encoded(value) for name, value in environment.items() if is_compared(name)},
        )

    def variables(self) -> dict[str, str]:
        """What travels, as `os.environ` has it."""
        return {name: _decoded(value) for name, value in self.travelling.items() if travels(name)}


known(Environment)


class RestartError(Exception):
    """This session must start again in a process with the leader's environment.

    Attributes:
        environment: the leader's.
    """

    def __init__(self, environment: Environment) -> None:
        super().__init__("the leader has another environment")
        self.environment = environment


def travels(name: str) -> bool:
    """Whether the leader's value of a variable counts on both ranks."""
    return name.startswith(_PREFIX) and name not in _LOCAL_NAMES and not name.endswith(_LOCAL_ENDINGS)


def travelling_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Those of `environment` that must hold on both ranks."""
    return {name: value for name, value in environment.items() if travels(name)}


def is_compared(name: str) -> bool:
    """Whether a variable of another library should be the same on both ranks."""
    if name in _UNCOMPARED_NAMES or name.startswith(_UNCOMPARED_PREFIXES) or name.endswith(_UNCOMPARED_ENDINGS):
        return False
    return name.startswith(_COMPARED_PREFIXES) or name in _COMPARED_NAMES


def record_environment() -> None:
    """Keeps this process's environment for the engines that it starts, before vLLM adds to it."""
    os.environ[RECORD_VARIABLE] = msgspec.json.encode(Environment.of(os.environ)).decode()


def recorded_environment() -> Environment:
    """What `record_environment` kept, in this process or in the one that started it; else the present environment."""
    record = os.environ.get(RECORD_VARIABLE)
    return Environment.of(os.environ) if record is None else msgspec.json.decode(record, type=Environment)


def with_leaders(own: Mapping[str, str], leader: Environment) -> dict[str, str]:
    """The environment of a session's process: this machine's own, with the leader's variables laid over it.

    Args:
        own: the environment of the supervisor.
        leader: as the last session left it.
    """
    kept = {name: value for name, value in own.items() if not travels(name) or name in _OWN_STAYS}
    return {**leader.variables(), **kept}


class SessionEnvironment:
    """The environment of one session's process, against those of the leaders that it meets.

    Args:
        adopted: the leader's environment that the supervisor has laid over its own for this process; None if it has
            not met one.
    """

    def __init__(self, adopted: Environment | None) -> None:
        self._adopted = adopted
        self._at_start = dict(os.environ)
        self._said: set[str] = set()

    def check(self, leader: Environment) -> None:
        """Makes sure that this process has the leader's variables; logs each that differs, once.

        Raises:
            RestartError: it does not, and a process that starts with them will.
        """
        for name, mine, theirs in self._differences(leader.compared, is_compared):
            self._say(
                f"{name} is {_described(mine)} here and {_described(theirs)} on the leader; "
                "it does not travel, set it alike on both machines"
            )
        different = self._differences(leader.travelling, travels)
        if not different:
            return
        if self._adopted is not None and self._adopted.travelling == leader.travelling:
            # It was there when this process started, so that vLLM itself has changed it since.
            adopt(leader.variables())
            return
        for name, mine, theirs in different:
            self._say(f"{name} is {_described(mine)} here and {_described(theirs)} on the leader, whose counts")
        raise RestartError(leader)

    def _differences(
        self, theirs: Mapping[str, str], is_meant: Callable[[str], bool]
    ) -> list[tuple[str, str | None, str | None]]:
        """Names with this side's value and the leader's, in order of the names."""
        mine = {name: _encoded(value) for name, value in os.environ.items() if is_meant(name)}
        names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
        return [
            (name, mine.get(name), theirs.get(name))
            for name in names
            # What vLLM has set here while it was imported, it will set again.
            if (name in theirs or name in self._at_start) and not self._is_own(name)
        ]

    def _is_own(self, name: str) -> bool:
        if name not in _OWN_STAYS or name not in self._at_start:
            return False
        adopted = {} if self._adopted is None else self._adopted.travelling
        return _encoded(self._at_start[name]) != adopted.get(name)

    def _say(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning("%s.", sentence)


def adopt(variables: Mapping[str, str]) -> None:
    """Sets the leader's variables in this process, but those of which this machine's own count."""
    os.environ.update({name: value for name, value in variables.items() if name not in _OWN_STAYS})


def _described(value: str | None) -> str:
    return "not set" if value is None else repr(_decoded(value))


def _encoded(value: str) -> str:
    """A value of `os.environ`, which may hold any bytes, as text that JSON can carry."""
    return os.fsencode(value).decode("latin-1")


def _decoded(value: str) -> str:
    return os.fsdecode(value.encode("latin-1"))
