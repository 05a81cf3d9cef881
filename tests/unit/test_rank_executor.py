"""vLLM's own code sets up the worker of either rank. Real connections, and vLLM's own executor."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from vllm_spark.collective import RuntimeOptions
from vllm_spark.errors import PeerLeftError
from vllm_spark.executor.group_connection import GroupConnection
from vllm_spark.executor.leader_executor import SparkExecutor
from vllm_spark.executor.rank_executor import FollowerExecutor, RankExecutor
from vllm_spark.executor.store import INIT_METHOD, close_groups
from vllm_spark.kernels import runtime as tuning

from .test_channel import connections

BOTH = pytest.mark.parametrize("kind", [SparkExecutor, FollowerExecutor], ids=["leader", "follower"])


class RecordingWorker:
    """A worker that keeps the calls it gets; vLLM makes it by its name."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments, self.calls = arguments, list[Any]()

    def init_device(self) -> None:
        self.calls.append("init_device")

    def load_model(self) -> None:
        self.calls.append("load_model")

    def initialize_from_config(self, kv_cache_config: str) -> None:
        self.calls.append(kv_cache_config)


@pytest.fixture
def groups() -> Iterator[GroupConnection]:
    near, far = connections()
    link = GroupConnection(near, lambda error: None)
    yield link
    close_groups()
    link.close(PeerLeftError("the test is over"))
    far.close()


@pytest.fixture
def vllm_config(monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmConfig]:
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    config = VllmConfig()
    config.model_config = SimpleNamespace(supports_multimodal_inputs=False)
    config.parallel_config.worker_cls = f"{__name__}.RecordingWorker"
    monkeypatch.setattr(type(current_platform), "update_block_size_for_backend", staticmethod(lambda config: None))
    yield config
    tuning.stop(config)


@pytest.fixture(scope="module")
def runtime() -> Any:
    """As on two machines, where the number of threads stays."""
    return SimpleNamespace(options=RuntimeOptions(transport="verbs"))


def load(kind: type[RankExecutor], config: VllmConfig, groups: GroupConnection, runtime: Any) -> RankExecutor:
    """The executor of that rank, with its worker set up."""
    executor = kind.__new__(kind)
    executor.vllm_config = config
    executor.load_worker(groups, runtime, (), own_process=False)
    return executor


def worker_of(executor: RankExecutor) -> Any:
    """Its worker, in vLLM's wrapper."""
    assert executor.driver_worker is not None
    return executor.driver_worker


@BOTH
def test_a_worker_has_its_rank_and_its_part_of_a_call(
    kind: type[RankExecutor], vllm_config: VllmConfig, groups: GroupConnection, runtime: Any
) -> None:
    wrapper = worker_of(load(kind, vllm_config, groups, runtime))
    arguments = wrapper.worker.arguments
    assert (arguments["rank"], arguments["local_rank"]) == (kind.rank, 0)
    assert arguments["distributed_init_method"] == INIT_METHOD
    wrapper.initialize_from_config(["the leader's cache", "the follower's cache"])
    own = ["the leader's cache", "the follower's cache"][kind.rank]
    assert wrapper.worker.calls == ["init_device", "load_model", own]


@BOTH
def test_vllm_sets_the_network_device_of_a_worker(
    kind: type[RankExecutor],
    vllm_config: VllmConfig,
    groups: GroupConnection,
    runtime: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step of vLLM's own set-up, which nothing of this project calls."""
    monkeypatch.setenv("VLLM_GPU_NIC_PCIE_MAPPING", "0000:01:00.0=0000:02:00.0")
    monkeypatch.delenv("VLLM_NIC_SELECTION_VARS", raising=False)
    with pytest.raises(RuntimeError, match="VLLM_NIC_SELECTION_VARS is not"):
        load(kind, vllm_config, groups, runtime)


def test_the_follower_makes_its_executor_of_a_configuration(
    vllm_config: VllmConfig, groups: GroupConnection, runtime: Any
) -> None:
    executor = FollowerExecutor(vllm_config, groups, runtime, ())
    assert worker_of(executor).worker.calls == ["init_device", "load_model"]
