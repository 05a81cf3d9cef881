"""Environment variables that must be the same on both ranks.

vLLM's variables choose kernels, compiler passes and the hub of models, some of them when vLLM is imported. So the
leader sends its own with the offer, and a follower with other values ends its process before it accepts: the next
process starts with the leader's. Variables of other libraries are not sent: a difference is logged.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping

from vllm_spark.records import from_json, to_json
from vllm_spark.variables import internal_name

logger = logging.getLogger("vllm_spark")

RECORD_VARIABLE = internal_name("environment")
"""Holds the environment as the user gave it, for the engine process: vLLM adds variables of its own."""

_PREFIX = "VLLM_"

_LOCAL_NAMES = frozenset(
    {
        # The follower loads from local folders, and need not have that library.
        "VLLM_USE_MODELSCOPE",
        # Settings of one process, or of how it starts others.
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
        # Files and folders; their names do not end in one of `_LOCAL_ENDINGS`.
        "VLLM_ASSETS_CACHE",
        "VLLM_MEDIA_CACHE",
        # Hardware.
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_GPU_NIC_PCIE_MAPPING",
        "VLLM_NIC_SELECTION_VARS",
        # Of the API server only, and usage statistics.
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
"""Endings of the names of vLLM's variables for files, folders and addresses."""

_FOLLOWER_WINS = frozenset({"VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_NUM_OF_RESERVED_CPU"})
"""Memory and cores of one machine: the leader's value applies only if the follower has none."""

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


@dataclasses.dataclass(frozen=True)
class Environment:
    """A leader's variables, encoded for JSON, with values that are not valid text too.

    Attributes:
        sent: those that the follower must have too.
        compared: those of other libraries.
    """

    sent: dict[str, str] = dataclasses.field(default_factory=dict)
    compared: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Environment:
        """The variables of `environment` (a mapping like `os.environ`) that are sent or compared."""
        return cls(
            {name: _encoded(value) for name, value in environment.items() if is_sent(name)},
            {name: _encoded(value) for name, value in environment.items() if is_compared(name)},
        )

    def variables(self) -> dict[str, str]:
        """The variables that are sent, with values as in `os.environ`."""
        return {name: _decoded(value) for name, value in self.sent.items() if is_sent(name)}


class RestartError(Exception):
    """The session must be restarted in a process with the leader's environment.

    Attributes:
        environment: the leader's.
    """

    def __init__(self, environment: Environment) -> None:
        super().__init__("the leader has another environment")
        self.environment = environment


def is_sent(name: str) -> bool:
    """Whether the leader's value of a variable applies on both ranks."""
    return name.startswith(_PREFIX) and name not in _LOCAL_NAMES and not name.endswith(_LOCAL_ENDINGS)


def sent_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that must be the same on both ranks."""
    return {name: value for name, value in environment.items() if is_sent(name)}


def is_compared(name: str) -> bool:
    """Whether a variable of another library should be the same on both ranks."""
    if name in _UNCOMPARED_NAMES or name.startswith(_UNCOMPARED_PREFIXES) or name.endswith(_UNCOMPARED_ENDINGS):
        return False
    return name.startswith(_COMPARED_PREFIXES) or name in _COMPARED_NAMES


def record_environment() -> None:
    """Keeps this process's environment for the engines that it starts, before vLLM adds to it."""
    os.environ[RECORD_VARIABLE] = to_json(Environment.of(os.environ)).decode()


def recorded_environment() -> Environment:
    """The environment that `record_environment` kept, in this process or its parent; else the present one."""
    record = os.environ.get(RECORD_VARIABLE)
    return Environment.of(os.environ) if record is None else from_json(record, Environment)


def merge_environment(own: Mapping[str, str], leader: Environment) -> dict[str, str]:
    """The environment of a session's process: this machine's own, overridden by the leader's variables.

    Args:
        own: the environment of the supervisor.
        leader: the leader's variables, as the last session received them.
    """
    kept = {name: value for name, value in own.items() if not is_sent(name) or name in _FOLLOWER_WINS}
    return {**leader.variables(), **kept}


class SessionEnvironment:
    """Compares the environment of a session's process with that of each leader.

    Args:
        adopted: the leader's environment with which the supervisor started this process; None without one.
    """

    def __init__(self, adopted: Environment | None) -> None:
        self._adopted = adopted
        self._at_start = dict(os.environ)
        self._logged: set[str] = set()

    def check(self, leader: Environment) -> None:
        """Checks that this process has the leader's variables; logs each difference once.

        Raises:
            RestartError: it does not; the next process must start with them.
        """
        for name, mine, theirs in self._differences(leader.compared, is_compared):
            self._log_once(
                f"{name} is {_described(mine)} here and {_described(theirs)} on the leader; "
                "set it to the same value on both machines"
            )
        different = self._differences(leader.sent, is_sent)
        if not different:
            return
        if self._adopted is not None and self._adopted.sent == leader.sent:
            # This process started with these, so vLLM itself has changed them since.
            adopt(leader.variables())
            return
        for name, mine, theirs in different:
            self._log_once(
                f"{name} is {_described(mine)} here and {_described(theirs)} on the leader; the leader's value applies"
            )
        raise RestartError(leader)

    def _differences(
        self, theirs: Mapping[str, str], matches: Callable[[str], bool]
    ) -> list[tuple[str, str | None, str | None]]:
        """Names with this side's value and the leader's, in order of the names."""
        mine = {name: _encoded(value) for name, value in os.environ.items() if matches(name)}
        names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
        return [
            (name, mine.get(name), theirs.get(name))
            for name in names
            # Variables that vLLM set here when it was imported will be set again.
            if (name in theirs or name in self._at_start) and not self._is_own(name)
        ]

    def _is_own(self, name: str) -> bool:
        if name not in _FOLLOWER_WINS or name not in self._at_start:
            return False
        adopted = {} if self._adopted is None else self._adopted.sent
        return _encoded(self._at_start[name]) != adopted.get(name)

    def _log_once(self, sentence: str) -> None:
        if sentence not in self._logged:
            self._logged.add(sentence)
            logger.warning("%s.", sentence)


def adopt(variables: Mapping[str, str]) -> None:
    """Sets the leader's variables in this process, except those for which this machine's own values apply."""
    os.environ.update({name: value for name, value in variables.items() if name not in _FOLLOWER_WINS})


def _described(value: str | None) -> str:
    return "not set" if value is None else repr(_decoded(value))


def _encoded(value: str) -> str:
    """A value of `os.environ`, which may hold any bytes, as text that JSON can carry."""
    return os.fsencode(value).decode("latin-1")


def _decoded(value: str) -> str:
    return os.fsdecode(value.encode("latin-1"))
