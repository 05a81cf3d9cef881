"""Every patch and hook against the sources of vLLM releases: fails when a fingerprint moves."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

from vllm_spark.backend.platform import ONE_MACHINE_ALL_REDUCES
from vllm_spark.compat.hooks import HOOKS, Hook
from vllm_spark.compat.patching import Anchor, all_patches
from vllm_spark.recording.parts import SCOPES

ROOT = Path(__file__).parents[2]
RELEASES = ("0.26.0", "0.32.0", "0.33.0")
GROUP = "vllm.distributed.parallel_state:GroupCoordinator"
SAME = "0.26.0, 0.32.0, 0.33.0"
GROUPS: tuple[Hook, ...] = (
    Hook(
        Anchor(f"{GROUP}.__init__", "source"),
        "makes this project's communicator, with these arguments, for groups of more than one rank",
        {"92a0a5a62581": "0.26.0", "f1ef9430d1d3": "0.32.0", "e2ec81599c9d": "0.33.0"},
    ),
    Hook(
        Anchor("vllm.distributed.parallel_state:_get_unique_name", "source"),
        "the communicator knows its group by this name: tp:0",
        {"872f987d5c8a": SAME},
    ),
    Hook(
        Anchor("vllm.distributed.parallel_state:init_model_parallel_group", "source"),
        "gives the model's groups a communicator",
        {"ae89aab915cd": "0.26.0", "fa58a9e39f93": "0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor(f"{GROUP}.all_reduce", "source"),
        "the opaque operator, or the communicator at once",
        {"a75030e5044f": "0.26.0", "d37407618e98": "0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor("vllm.distributed.parallel_state:all_reduce", "source"),
        "the opaque operator: calls the group",
        {"674f738ba97b": SAME},
    ),
    Hook(Anchor(f"{GROUP}._all_reduce_out_place", "source"), "calls the communicator", {"ef76d0f43f1b": SAME}),
    Hook(
        Anchor(f"{GROUP}.all_gather", "source"),
        "the opaque operator, or the communicator at once",
        {"6914ef7afbe0": SAME},
    ),
    Hook(
        Anchor("vllm.distributed.parallel_state:all_gather", "source"),
        "the opaque operator: calls the group",
        {"4c045684fccd": SAME},
    ),
    Hook(Anchor(f"{GROUP}._all_gather_out_place", "source"), "calls the communicator", {"41905fe8c10b": SAME}),
    Hook(
        Anchor(f"{GROUP}.reduce_scatter", "source"),
        "the opaque operator, or the communicator at once",
        {"fadc99a339aa": SAME},
    ),
    Hook(
        Anchor("vllm.distributed.parallel_state:reduce_scatter", "source"),
        "the opaque operator: calls the group",
        {"c4082408a67e": SAME},
    ),
    Hook(Anchor(f"{GROUP}._reduce_scatter_out_place", "source"), "calls the communicator", {"28efa222fc84": SAME}),
    Hook(Anchor(f"{GROUP}.all_gatherv", "source"), "calls the communicator", {"cfcc6f745d60": SAME}),
    Hook(
        Anchor(f"{GROUP}.gather", "source"),
        "calls the communicator",
        {"5fa7f5784d11": "0.26.0", "65b349be6b5e": "0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor(f"{GROUP}.broadcast", "source"),
        "goes past the communicator, so that nothing counts it",
        {"7fa82df42e78": SAME},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.base_device_communicator:DeviceCommunicatorBase.__init__"),
        "sets the group's name, size and rank, which decide what is routed",
        {"c97e3d7a6bbf": "0.26.0", "e51158476b35": "0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.cuda_communicator:CudaCommunicator.__init__", "source"),
        "connects NCCL, and all-reduces for GPUs of one machine, which `turn_off_one_machine_all_reduces` turns off",
        {"f7deab941503": "0.26.0", "5d793b8c19d8": "0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor("vllm.distributed.device_communicators.base_device_communicator:DeviceCommunicatorBase.all_gatherv"),
        "counted and passed on",
        {"05358d9ddb84": SAME},
    ),
    Hook(
        Anchor("vllm.distributed.parallel_state:destroy_model_parallel"),
        "called after a start that failed in the user's own process",
        {"2d2a18a975fa": SAME},
    ),
    Hook(
        Anchor("vllm.distributed.parallel_state:destroy_distributed_environment"),
        "called after a start that failed in the user's own process",
        {"ee7261775843": SAME},
    ),
)
"""The way from a model's collective to the communicator."""

MARLIN = "vllm.model_executor.layers.quantization.utils.marlin_utils"
TUNING: tuple[Hook, ...] = (
    Hook(
        Anchor("vllm.model_executor.layers.fused_moe.experts.marlin_moe:_fused_marlin_moe", "source"),
        "calls the operator twice, sizes by name, without a tile, with a row of weights for each token, and four locks",
        {"37b9cae337cc": "0.26.0", "b3d817f70503": "0.32.0", "685bfe2a8037": "0.33.0"},
    ),
    Hook(
        Anchor("vllm.model_executor.layers.fused_moe.fused_moe:try_get_optimal_moe_config", "source"),
        "asks for a table by the name that is patched, and takes the nearest row",
        {"44982a4a89f6": SAME},
    ),
    Hook(
        Anchor("vllm.model_executor.layers.fused_moe.fused_moe:get_config_file_name", "source"),
        "the names of tables",
        {"91d851bc7881": SAME},
    ),
    Hook(
        Anchor("vllm.utils.platform_utils:get_device_name_as_file_name", "source"),
        "the device in names of tables",
        {"e3aa117a1972": SAME},
    ),
    Hook(
        Anchor("vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEKernel.fused_experts", "source"),
        "the class of experts that was chosen",
        {"ef501697f405": SAME},
    ),
    Hook(
        Anchor("vllm.config.vllm:VllmConfig.get_quantization_config", "source"),
        "read again after groups were made smaller",
        {"770a95d3cb3a": SAME},
    ),
    Hook(
        Anchor("vllm.model_executor.model_loader.weight_utils:get_quant_config", "source"),
        "where a model's quantization is described",
        {"8c62656d482b": "0.26.0", "58be4e9d7ad9": "0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor("vllm.model_executor.model_loader.default_loader:DefaultModelLoader.load_weights", "source"),
        "loads what get_all_weights gives",
        {"72c56fb1ebd8": "0.26.0", "3e1a777ee6d6": "0.32.0, 0.33.0"},
    ),
    Hook(
        Anchor("vllm.model_executor.kernels.linear.mixed_precision.marlin:MarlinLinearKernel.can_implement", "source"),
        "pads what no tile divides, and refuses a part that is no whole number of groups",
        {"08daf06c0b42": "0.26.0", "0d36cc7599e4": "0.32.0, 0.33.0"},
    ),
    Hook(Anchor(f"{MARLIN}:check_marlin_supports_layer", "source"), "likewise, AWQ", {"8b98bccb5937": SAME}),
    Hook(Anchor(f"{MARLIN}:marlin_padded_nk", "source"), "the padded sizes", {"14617425c0a5": SAME}),
    Hook(Anchor(f"{MARLIN}:marlin_moe_padded_intermediate", "source"), "likewise, experts", {"5cef7e3d8988": SAME}),
    Hook(
        Anchor(f"{MARLIN}:get_marlin_input_dtype", "source"),
        "the variable that is refused on a GB10",
        {"61d8914a8139": SAME},
    ),
)
"""What tuned parameters and repeated scales rely on."""

ENGINE = "vllm.v1.engine.core:EngineCoreProc"
TRACING: tuple[Hook, ...] = (
    Hook(
        Anchor("vllm.v1.utils:record_function_or_nullcontext", "source"),
        "calls the function in _PROFILER_FUNC, if there is one, for each scope of the model runner",
        {"7fb1f604e7b5": SAME},
    ),
    Hook(
        Anchor(f"{ENGINE}.run_busy_loop", "source"),
        "calls the two below by their names",
        {"ea4a9db06dea": "0.26.0", "fc678d24e3e0": "0.32.0, 0.33.0"},
    ),
    Hook(Anchor(f"{ENGINE}._process_input_queue"), "the part of clients' requests", {"2534f0e6fa77": SAME}),
    Hook(Anchor(f"{ENGINE}._process_engine_step"), "the part around a step", {"50a97b384537": SAME}),
    Hook(
        Anchor("vllm.v1.core.sched.scheduler:Scheduler.schedule"),
        "a part, with which a step begins",
        {"cde460894da8": SAME},
    ),
    Hook(Anchor("vllm.v1.core.sched.scheduler:Scheduler.update_from_output"), "a part", {"ec49609035ab": SAME}),
)
"""What traces of steps replace while they are recorded."""

ANCHORS: list[tuple[Anchor, dict[str, str]]] = [
    *((patch.anchor, dict(patch.fingerprints)) for patch in all_patches()),
    *((hook.anchor, dict(hook.fingerprints)) for hook in (*HOOKS, *GROUPS, *TUNING, *TRACING)),
]


@pytest.fixture(scope="module", params=RELEASES)
def sources(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """A release and the folder of its sources: from VLLM_SOURCES, or fetched once through pip."""
    given = os.environ.get("VLLM_SOURCES")
    if given:
        return request.param, Path(given) / f"vllm-{request.param}"
    folder = _fetched()[request.param]
    if isinstance(folder, Exception):
        pytest.skip(
            f"the sources of vLLM {request.param} cannot be had: {folder}; set VLLM_SOURCES to a folder with them"
        )
    return request.param, folder


@functools.cache
def _fetched() -> dict[str, Path | Exception]:
    """The folder of each release, or why there is none."""
    found: dict[str, Path | Exception] = fetch_tool().fetch(RELEASES, ROOT / "build" / "vllm-sources")
    return found


@pytest.mark.timeout(900)
def test_the_scopes_of_the_model_runner(sources: tuple[str, Path]) -> None:
    _, folder = sources
    text = (folder / "vllm" / "v1" / "worker" / "gpu_model_runner.py").read_text(encoding="utf-8")
    assert set(SCOPES) <= set(re.findall(r'record_function_or_nullcontext\(\s*"([^"]+)"', text))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("anchor", "known"), ANCHORS, ids=[anchor.symbol.partition(":")[2] for anchor, _ in ANCHORS])
def test_fingerprints_are_known(sources: tuple[str, Path], anchor: Anchor, known: dict[str, str]) -> None:
    release, folder = sources
    path = folder / (anchor.module.replace(".", "/") + ".py")
    fingerprint = anchor.fingerprint(path.read_text(encoding="utf-8"))
    assert fingerprint is not None, f"{anchor.symbol} is gone in vLLM {release}"
    assert fingerprint in known, f"{anchor.symbol} has moved in vLLM {release}: read it, then add {fingerprint}"
    assert release in known[fingerprint], f"{fingerprint} is listed for {known[fingerprint]}, not for {release}"


@pytest.mark.timeout(900)
def test_every_all_reduce_of_one_machine_is_turned_off(sources: tuple[str, Path]) -> None:
    """Those that a setting turns on: else their buffers would be connected at each start."""
    _, folder = sources
    path = folder / "vllm" / "distributed" / "device_communicators" / "cuda_communicator.py"
    names = set(re.findall(r"envs\.(VLLM_ALLREDUCE_\w+)", path.read_text(encoding="utf-8")))
    assert "VLLM_ALLREDUCE_USE_SYMM_MEM" in names
    assert names <= set(ONE_MACHINE_ALL_REDUCES)


def fetch_tool() -> ModuleType:
    """The module tools/fetch_vllm_sources.py."""
    spec = importlib.util.spec_from_file_location("fetch_vllm_sources", ROOT / "tools" / "fetch_vllm_sources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
