"""What vLLM does not take and what a pair cannot do, each in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.backend.speculation import check_draft_ranks
from vllm_spark.backend.support import (
    EXECUTOR,
    check_configuration,
    check_divisible,
    check_experts,
    check_supported,
    disable_fused_collectives,
    user_errors_from_vllm,
)
from vllm_spark.errors import ConfigurationError
from vllm_spark.models.tiny import make_tiny_model

from .folder_rights import no_entry


def test_a_model_whose_folder_may_not_be_entered(tmp_path: Path) -> None:
    """vLLM takes it for the name of a model on the hub, and complains about that."""
    model = tmp_path / "model"
    with no_entry(tmp_path), pytest.raises(ConfigurationError) as caught, user_errors_from_vllm(str(model)):
        raise OSError(f"Repo id must be in the form 'repo_name': '{model}'")
    assert (
        str(caught.value)
        == f"the model {model} cannot be read (Permission denied); let the user that serves it read it"
    )
    with (
        pytest.raises(ConfigurationError, match=r"there is no folder .*/model; give"),
        user_errors_from_vllm(str(model)),
    ):
        raise OSError("the same")


def test_a_single_file_that_vllm_does_not_take(tmp_path: Path) -> None:
    """It is there, and not a folder: both are said."""
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises(ConfigurationError) as caught, user_errors_from_vllm(str(model)):
        raise OSError(f"It looks like the config file at '{model}' is not a valid JSON file.")
    assert str(caught.value) == (
        f"the single file {model} cannot be loaded as a model by this vLLM (It looks like the config file at '{model}' "
        "is not a valid JSON file); give a folder"
    )


def test_a_package_that_vllm_lacks() -> None:
    """What reads s3:// is not part of plain vLLM."""
    with pytest.raises(ConfigurationError) as caught, user_errors_from_vllm("s3://bucket/model"):
        raise ModuleNotFoundError("No module named 'runai_model_streamer'")
    assert str(caught.value) == (
        "vLLM needs a package that it cannot import here (No module named 'runai_model_streamer'); install it into the "
        "environment of vLLM on both machines"
    )


def test_a_list_of_all_architectures_is_left_out() -> None:
    with pytest.raises(ConfigurationError) as caught, user_errors_from_vllm("model"):
        raise ValueError("Model architectures ['A'] are not supported. Supported architectures: dict_keys(['B'])")
    assert str(caught.value) == "Model architectures ['A'] are not supported (VLLM_LOGGING_LEVEL=DEBUG shows where)"


def create_speculative_config(error: Exception) -> None:
    """Raises `error`, from a function with the name of vLLM's."""
    raise error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ValueError("Total number of attention heads (5) must be divisible by tensor parallel size (2)."),
            "the draft model /nowhere/draft cannot be split into two equal halves (Total number of attention heads (5) "
            "must be divisible by tensor parallel size (2)); use another one, or serve without --spark",
        ),
        (
            ValueError("Invalid repository ID or local directory specified: '/nowhere/draft'"),
            "there is no folder /nowhere/draft; give a model's folder, or its name on the hub",
        ),
        (
            NotImplementedError("Unsupported speculative method: 'mtp'"),
            "--speculative-config is invalid: Unsupported speculative method: 'mtp' (VLLM_LOGGING_LEVEL=DEBUG shows "
            "where)",
        ),
    ],
)
def test_errors_about_speculation_name_the_draft(error: Exception, sentence: str) -> None:
    arguments = SimpleNamespace(speculative_config={"model": "/nowhere/draft"})
    with pytest.raises(ConfigurationError) as caught, user_errors_from_vllm("model", arguments):
        create_speculative_config(error)
    assert str(caught.value) == sentence


def test_an_error_in_vllm_keeps_its_traceback() -> None:
    with pytest.raises(KeyError), user_errors_from_vllm("model"):
        raise KeyError("a bug")


def test_options_that_exclude_each_other() -> None:
    """vLLM has assertions for some, with a sentence; one without is an error in vLLM."""
    with pytest.raises(ConfigurationError) as caught, user_errors_from_vllm("model"):
        raise AssertionError("Microbatching needs another backend. To fix use one")
    assert str(caught.value) == (
        "Microbatching needs another backend. To fix use one (VLLM_LOGGING_LEVEL=DEBUG shows where)"
    )
    with pytest.raises(AssertionError), user_errors_from_vllm("model"):
        raise AssertionError


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("enable_dbo", True, "--enable-dbo cannot be used with --spark: microbatches"),
        ("ubatch_size", 2, "--ubatch-size 2 cannot be used with --spark: microbatches"),
        ("kv_offloading_size", 4.0, "--kv-offloading-size 4.0 cannot be used with --spark: KV connectors"),
        ("data_parallel_size_local", 0, "--data-parallel-size-local 0 cannot be used with --spark: a pair serves one"),
        ("data_parallel_hybrid_lb", True, "--data-parallel-hybrid-lb cannot be used with --spark: a pair serves one"),
        ("enable_elastic_ep", True, "--enable-elastic-ep cannot be used with --spark: a pair serves one"),
        ("enable_fault_tolerance", True, "--enable-fault-tolerance cannot be used with --spark: a pair serves one"),
    ],
)
def test_options_of_more_than_a_pair(field: str, value: Any, sentence: str) -> None:
    check_supported(SimpleNamespace(enable_dbo=False, ubatch_size=0, kv_offloading_size=None))
    with pytest.raises(ConfigurationError) as caught:
        check_supported(SimpleNamespace(**{field: value}))
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(("device", "experts", "refused"), [("cpu", 8, True), ("cpu", 0, False), ("cuda", 8, False)])
def test_whole_experts_on_each_rank(device: str, experts: int, refused: bool) -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(enable_expert_parallel=True),
        device_config=SimpleNamespace(device_type=device),
        model_config=SimpleNamespace(get_num_experts=lambda: experts),
    )
    if not refused:
        check_experts(config)
        return
    with pytest.raises(ConfigurationError, match=r"^--enable-expert-parallel cannot be used with --spark on CPUs: "):
        check_experts(config)


def halves(**sizes: int) -> SimpleNamespace:
    """The part of a model's configuration that is split."""
    return SimpleNamespace(hf_text_config=SimpleNamespace(**sizes), model="/models/draft")


def with_draft(draft: SimpleNamespace, **speculation: Any) -> SimpleNamespace:
    """A configuration with speculation, whose target can be split."""
    return SimpleNamespace(
        model_config=halves(num_attention_heads=4),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
        speculative_config=SimpleNamespace(draft_model_config=draft, **speculation),
    )


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 5}, {"num_key_value_heads": 3}, {"intermediate_size": 511}])
def test_a_draft_that_cannot_be_split(sizes: dict[str, int]) -> None:
    check_divisible(with_draft(halves(num_attention_heads=4, num_key_value_heads=1, intermediate_size=512)))
    ((name, size),) = sizes.items()
    with pytest.raises(ConfigurationError) as caught:
        check_divisible(with_draft(halves(**sizes)))
    assert str(caught.value) == (
        f"the draft model /models/draft cannot be split into two equal halves ({name} is {size}); use another one, or "
        "serve without --spark"
    )


def test_a_draft_model_on_one_rank() -> None:
    for method, ranks in (("draft_model", 2), ("ngram", None), ("eagle3", 1)):
        check_draft_ranks(with_draft(halves(), method=method, draft_tensor_parallel_size=ranks))
    with pytest.raises(ConfigurationError) as caught:
        check_draft_ranks(with_draft(halves(), method="draft_model", draft_tensor_parallel_size=1))
    assert str(caught.value) == (
        "draft_tensor_parallel_size 1 of --speculative-config cannot be used with --spark: vLLM runs a draft model on "
        "the ranks of its target, half of it on each; leave it out"
    )


def made_by_vllm(**parts: Any) -> SimpleNamespace:
    """A configuration as vLLM makes it for a pair, but for `parts`, named by their path with two underscores."""
    parallel = SimpleNamespace(
        tensor_parallel_size=2,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        decode_context_parallel_size=1,
        nnodes=1,
        distributed_executor_backend=EXECUTOR,
        assigned_physical_gpu_ids=None,
    )
    config = SimpleNamespace(
        parallel_config=parallel, kv_transfer_config=None, model_config=SimpleNamespace(multimodal_config=None)
    )
    for path, value in parts.items():
        *owners, name = path.split("__")
        owner = config
        for each in owners:
            owner = getattr(owner, each)
        setattr(owner, name, value)
    return config


def test_what_a_pair_can_do_is_not_refused() -> None:
    check_configuration(made_by_vllm())
    check_configuration(made_by_vllm(model_config__multimodal_config=SimpleNamespace(mm_processor_cache_type="lru")))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"kv_transfer_config": SimpleNamespace(kv_connector="OffloadingConnector")},
            "--kv-transfer-config (or --kv-offloading-size) OffloadingConnector cannot be used with --spark: KV conn",
        ),
        ({"parallel_config__data_parallel_size": 2}, "--data-parallel-size (or VLLM_DP_SIZE) 2 cannot be used with"),
        (
            {"parallel_config__assigned_physical_gpu_ids": [1]},
            "--device-ids [1] cannot be used with --spark: each machine",
        ),
        (
            {"parallel_config__distributed_executor_backend": "mp"},
            "--distributed-executor-backend mp cannot be used with",
        ),
        (
            {"model_config__multimodal_config": SimpleNamespace(mm_processor_cache_type="shm")},
            "--mm-processor-cache-type shm cannot be used with --spark: a shared-memory cache",
        ),
    ],
)
def test_what_vllm_derived_is_refused_like_what_was_typed(parts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_configuration(made_by_vllm(**parts))
    assert str(caught.value).startswith(sentence)


def test_what_the_installed_vllm_derives_is_found(tmp_path: Path) -> None:
    """The real thing: a variable of vLLM's that no option shows."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    program = f"""
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model={str(make_tiny_model(tmp_path, "moe"))!r}, additional_config={{"spark": {{}}}}).create_engine_config()
"""
    environment = os.environ | {"VLLM_DP_SIZE": "2"}
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=400, env=environment, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "(or VLLM_DP_SIZE)" in last, done.stderr[-2000:]
    assert "cannot be used with --spark" in last


def test_compiler_passes_with_collectives_of_their_own_are_off() -> None:
    passes = SimpleNamespace(fuse_allreduce_rms=None, enable_sp=None, fuse_norm_quant=None)
    arguments = SimpleNamespace(compilation_config=SimpleNamespace(pass_config=passes))
    disable_fused_collectives(arguments)
    assert vars(passes) == {"fuse_allreduce_rms": False, "enable_sp": False, "fuse_norm_quant": None}
    passes.fuse_allreduce_rms = True
    with pytest.raises(ConfigurationError, match=r"pass_config\.fuse_allreduce_rms cannot be used with --spark"):
        disable_fused_collectives(arguments)
