"""`vllm-spark doctor MODEL`: what is said of a model before it is served, and what a fault in it looks like."""

from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hub import COMMIT, cache_model
from vllm_spark.cli import main
from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.checks import run_checks
from vllm_spark.doctor.finding import Finding
from vllm_spark.doctor.model import memory as model_memory
from vllm_spark.doctor.model.question import ModelQuestion
from vllm_spark.doctor.remote import send_report
from vllm_spark.errors import EXIT_USAGE
from vllm_spark.executor.channel.framing import Kind
from vllm_spark.files import configs_folder
from vllm_spark.memory.need import MemoryNeed
from vllm_spark.model_check.checks import examine, with_files
from vllm_spark.processes.managed import clean_environment, program
from vllm_spark.records import from_json, to_json

from .gb10_tree import GIB_IN_KIB, Tree, gb10
from .test_doctor import assert_complete
from .test_doctor_pair import called, follower, visiting

MODELS = sorted(path.name for path in (configs_folder() / "models").iterdir())
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with a secret, no tables, and no settings."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("VLLMSPARK_SECRET", "one secret, long enough")
    monkeypatch.delenv("VLLM_MARLIN_INPUT_DTYPE", raising=False)


def config_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((configs_folder() / "models" / name / "config.json").read_text())
    return content


def safetensors(path: Path, size: int = 1000) -> None:
    """A weight file with one tensor of `size` bytes."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))


def model_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """A complete model in two files, which are much smaller than its config.json says."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or config_of("qwen3-30b-a3b-int4")))
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in names:
        safetensors(folder / name)
    index = {"weight_map": {f"tensor{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def examined(model: str | Path, tree: Tree | None = None) -> dict[str, Finding]:
    """All findings about a model, on this machine or on another one's files."""
    question, findings = examine(str(model), SparkConfig())
    if question is not None and tree is not None:
        machine = run_checks(tree.system, SparkConfig(), model=question)
        findings = [*findings, *(finding for finding in machine.findings if finding.area == "model")]
    for each in findings:
        assert each.title != "A check that failed", each
        assert_complete(each)
    assert len({each.id for each in findings}) == len(findings)
    return {each.id: each for each in findings}


def text_of(finding: Finding) -> str:
    return f"{finding.value}\n{finding.explanation}\n{finding.remedy}"


# --- models that are well --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_known_model_on_a_gb10(name: str, tmp_path: Path) -> None:
    found = examined(name, gb10(tmp_path / "machine"))
    assert {each.status for each in found.values()} <= {"ok", "note", "not applicable"}, found
    assert found.keys() >= {"model.config", "model.division", "model.groups", "model.speed", "model.format"}
    assert "tokens per second for one sequence" in found["model.speed"].value
    assert found["model.files"].value == "this project has its configuration alone"
    assert "tokens" in found["model.memory"].value


def test_what_is_said_of_some_models(tmp_path: Path) -> None:
    glm = examined("glm-4.5-air-int4")
    assert glm["model.groups"].value == "128, served as 64"
    assert "moe_intermediate_size is 1408, and the 704 of one rank" in glm["model.groups"].explanation
    assert glm["model.tables"].remedy.startswith("vllm-spark tune glm-4.5-air-int4 ")
    assert "one machine alone cannot hold it" in examined("minimax-m2-int4")["model.speed"].value
    assert examined("llama-3.3-70b-int4")["model.tables"].status == "not applicable"
    assert "97% of the bytes in MXFP4" in examined("gpt-oss-120b")["model.format"].value


def test_a_table_that_applies(tmp_path: Path) -> None:
    """A version in fp8, whose experts' table owners of a GB10 have published."""
    config = config_of("qwen3-coder-next-int4")
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["moe_intermediate_size"] = 1024
    found = examined(model_folder(tmp_path / "fp8", config))
    assert found["model.tables"].status == "ok", found["model.tables"]
    assert "published by" in found["model.tables"].value
    assert "In INT4 this model would make" in found["model.format"].explanation


def test_an_unquantized_model_has_the_price_of_its_format(tmp_path: Path) -> None:
    config = config_of("qwen3-32b-int4")
    del config["quantization_config"]
    found = examined(model_folder(tmp_path / "bf16", config))
    assert found["model.format"].status == "note"
    assert "100% of the bytes in bfloat16" in found["model.format"].value
    assert "tokens per second in place of" in found["model.format"].explanation
    assert found["model.groups"].status == "not applicable"


def test_a_model_of_an_unknown_kind(tmp_path: Path) -> None:
    config = {"model_type": "gemma9", "architectures": ["Gemma9"], "num_attention_heads": 8, "num_key_value_heads": 1}
    found = examined(model_folder(tmp_path / "new", config), gb10(tmp_path / "machine"))
    assert found["model.speed"].status == "unknown"
    assert found["model.division"].status == "ok"
    assert found["model.division"].value == "8 heads, 1 KV heads, the KV head on both"
    assert found["model.memory"].status in ("ok", "note")


# --- models that a pair cannot serve ---------------------------------------------------------------------------------


def _with(name: str, **values: Any) -> dict[str, Any]:
    return config_of(name) | values


@pytest.mark.parametrize(
    ("config", "name", "status", "parts"),
    [
        (_with("qwen3-32b-int4", num_attention_heads=63), "model.division", "problem", ["num_attention_heads is 63"]),
        (_with("qwen3-32b-int4", num_key_value_heads=5), "model.division", "problem", ["num_key_value_heads is 5"]),
        (
            _with("qwen3-30b-a3b-int4", moe_intermediate_size=769),
            "model.division",
            "problem",
            ["moe_intermediate_size is 769", "without --spark"],
        ),
        (
            _with("qwen3-coder-next-int4", linear_num_key_heads=15),
            "model.division",
            "problem",
            ["linear_num_key_heads is 15"],
        ),
        (
            _with("glm-4.5-air-int4", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
            "model.division",
            "problem",
            ["5472 inputs of mlp.down_proj on each rank, in blocks of 128 x 128"],
        ),
        (
            _with(
                "qwen3-32b-int4",
                intermediate_size=17408 + 128,
                quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
            ),
            "model.groups",
            "problem",
            ["intermediate_size is 17536", "desc_act"],
        ),
        (
            _with(
                "qwen3-30b-a3b-int4",
                moe_intermediate_size=1408,
                quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
            ),
            "model.groups",
            "warning",
            ["moe_intermediate_size 1408 in groups of 128", "slower", "groups of 64"],
        ),
    ],
    ids=["heads", "KV heads", "experts", "linear attention", "blocks", "groups", "slow groups"],
)
def test_a_fault_of_the_configuration(
    tmp_path: Path, config: dict[str, Any], name: str, status: str, parts: list[str]
) -> None:
    found = examined(model_folder(tmp_path / "model", config))[name]
    assert found.status == status, found
    for part in parts:
        assert part in text_of(found)


def test_inputs_that_corrupt_a_gb10s_results(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "model.inputs" not in examined("qwen3-32b-int4")
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "fp8")
    found = examined("qwen3-32b-int4")["model.inputs"]
    assert (found.status, found.remedy) == ("problem", "unset VLLM_MARLIN_INPUT_DTYPE")


@pytest.mark.parametrize(
    ("content", "part"),
    [("{", "is not valid JSON"), ("[]", "does not hold a JSON object"), (None, "there is no model")],
    ids=["cut off", "a list", "absent"],
)
def test_a_configuration_that_cannot_be_read(tmp_path: Path, content: str | None, part: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if content is not None:
        (folder / "config.json").write_text(content)
    found = examined(folder)
    assert list(found) == ["model.config"]
    assert found["model.config"].status == "problem"
    assert part in text_of(found["model.config"]).lower() or part in text_of(found["model.config"])


# --- files -----------------------------------------------------------------------------------------------------------


def shard_missing(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def shard_cut_off(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shard_of_git_lfs(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("fault", "status", "parts"),
    [
        (shard_missing, "problem", ["lacks model-00002-of-00002.safetensors", "The index of its weights"]),
        (shard_cut_off, "problem", ["model-00001-of-00002.safetensors has", "of 10", "cut off"]),
        (shard_of_git_lfs, "problem", ["is not a safetensors file"]),
        (no_weights, "problem", ["has no weights", "--load-format dummy"]),
        (no_tokenizer, "warning", ["has no tokenizer", "--skip-tokenizer-init"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_fault_of_the_files(tmp_path: Path, fault: Callable[[Path], None], status: str, parts: list[str]) -> None:
    folder, tree = model_folder(tmp_path / "model"), gb10(tmp_path / "machine")
    before = examined(folder, tree)["model.files"]
    assert (before.status, before.value) == ("ok", f"{folder}: 2 weight files, 0.0 MB")
    fault(folder)
    found = examined(folder, tree)["model.files"]
    assert found.status == status
    for part in parts:
        assert part in text_of(found)


def spark(tmp_path: Path, *argv: str, **more: str) -> subprocess.CompletedProcess[str]:
    """`vllm-spark ARGV` of a user with an own cache of the hub, where a hub that is asked would not answer."""
    environment = clean_environment() | {
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "COLUMNS": "80",
    }
    return subprocess.run(
        [program("vllm-spark"), *argv],
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def of_cli(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    assert "Traceback" not in done.stderr
    return {each["id"]: each for each in json.loads(done.stdout)["machine"]["findings"]}


def test_a_name_of_the_hub_is_looked_up_in_the_cache_alone(tmp_path: Path) -> None:
    absent = of_cli(spark(tmp_path, "doctor", "somebody/some-model", "--json"))
    assert "model.files" not in absent
    assert absent["model.config"]["remedy"] == "hf download somebody/some-model config.json"
    snapshot = cache_model(model_folder(tmp_path / "model"), tmp_path / "hub" / "hub", "somebody/some-model")
    cached = of_cli(spark(tmp_path, "doctor", "somebody/some-model", "--json"))
    assert cached["model.files"]["status"] == "ok"
    assert COMMIT in cached["model.files"]["value"]
    for path in snapshot.glob("*.safetensors*"):
        path.unlink()
    empty = of_cli(spark(tmp_path, "doctor", "somebody/some-model", "--json"))
    assert "has no weights" in empty["model.files"]["value"]
    assert empty["model.files"]["remedy"] == "hf download somebody/some-model"


def test_the_screen_of_80_columns(tmp_path: Path) -> None:
    shown = spark(tmp_path, "doctor", "glm-4.5-air-int4").stdout
    prose = [line for line in shown.splitlines() if not line.lstrip().startswith(">")]
    assert max(map(len, prose)) <= 80
    for part in ("The model", "Divides by two ranks: 96 heads, 8 KV heads", "> vllm-spark tune glm-4.5-air-int4"):
        assert part in shown


@pytest.mark.parametrize("other", ["--first-run", "--make-secret"])
def test_a_model_is_not_ignored(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [other, "--listen"] if other == "--first-run" else [other]
    assert main(["doctor", "some-model", *words]) == EXIT_USAGE
    assert f"the model some-model does not go with {other}" in capsys.readouterr().err


# --- memory ----------------------------------------------------------------------------------------------------------


def question(**values: Any) -> ModelQuestion:
    need = MemoryNeed(weights=30 * GIB, graphs=2 * GIB, utilization=0.92)
    return dataclasses.replace(ModelQuestion("some-model", need, token_bytes=100_000, longest=131_072), **values)


def memory_finding(tree: Tree, asked: ModelQuestion) -> Finding:
    machine = run_checks(tree.system, SparkConfig(), model=asked)
    (found,) = [each for each in machine.findings if each.id == "model.memory"]
    assert_complete(found)
    return found


def available(tree: Tree, gib: int) -> None:
    tree.write("proc/meminfo", f"MemTotal: {120 * GIB_IN_KIB} kB\nMemAvailable: {gib * GIB_IN_KIB} kB")


@pytest.mark.parametrize(
    ("gib", "status", "parts"),
    [
        (119, "ok", ["a KV cache of 78.4: 841,"]),
        (110, "note", ["a KV cache of 70.0: 751,", "vllm serve some-model --spark --gpu-memory-utilization 0.85"]),
        (50, "warning", ["107,374 tokens", "131,072 tokens", "--gpu-memory-utilization 0.35 --max-model-len 106496"]),
        (38, "problem", ["does not fit into the memory", "ps -eo rss"]),
    ],
)
def test_memory_of_a_gb10(tmp_path: Path, gib: int, status: str, parts: list[str]) -> None:
    tree = gb10(tmp_path / "machine")
    available(tree, gib)
    found = memory_finding(tree, question())
    assert found.status == status, found
    for part in parts:
        assert part in text_of(found)


def test_a_model_that_no_empty_gb10_could_hold(tmp_path: Path) -> None:
    tree = gb10(tmp_path / "machine")
    found = memory_finding(tree, question(need=MemoryNeed(weights=130 * GIB, utilization=0.92)))
    assert found.status == "problem"
    assert found.remedy.startswith("vllm-spark estimate some-model ")


def test_a_gpu_with_memory_of_its_own(tmp_path: Path) -> None:
    """The machine's memory does not count there."""
    tree = gb10(tmp_path / "machine")
    tree.nvidia_smi("Total                             : N/A", "Total                             : 40960 MiB")
    available(tree, 20)
    assert "of 40.0 GiB available" in memory_finding(tree, question(longest=0)).value
    assert memory_finding(tree, question(longest=0)).status in ("ok", "note")


def test_the_cpu_build_counts_this_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = gb10(tmp_path / "machine")
    for pattern in ("usr/bin/nvidia-smi", "proc/driver/nvidia/version"):
        tree.remove(pattern)
    monkeypatch.setattr(model_memory, "is_cpu_build", lambda: True)
    assert "kept free 1.0 of 110.0 GiB" in memory_finding(tree, question()).value
    monkeypatch.setattr(model_memory, "is_cpu_build", lambda: False)
    assert memory_finding(tree, question()).status == "not applicable"


# --- the other machine -----------------------------------------------------------------------------------------------


def asked_of_a_follower(asked: ModelQuestion, there: SparkConfig) -> dict[str, Finding]:
    """What a follower with these settings answers, over a real connection."""
    port, outcome = visiting(model=asked)
    connection = called(follower(port))
    send_report(connection, connection.expect(Kind.CHECK_REQUEST, timeout=30), there, "127.0.0.1")
    machine, _ = outcome.result(60)
    return {each.id: each for each in machine.findings if each.area == "model"}


def test_the_other_machine_has_the_same_files_elsewhere(tmp_path: Path) -> None:
    here, there = model_folder(tmp_path / "here"), model_folder(tmp_path / "there")
    asked, _ = examine(str(here), SparkConfig())
    assert asked is not None
    asked = with_files(asked, SparkConfig())
    assert asked.files is not None
    config = SparkConfig(model_path=f"{here}={there}")
    found = asked_of_a_follower(asked, config)
    assert (found["model.files"].status, found["model.files"].value) == ("ok", f"{there}, the same as the leader's")
    assert "model.memory" in found
    assert from_json(to_json(asked), ModelQuestion) == asked


def test_the_other_machine_lacks_files(tmp_path: Path) -> None:
    here = model_folder(tmp_path / "here")
    asked, _ = examine(str(here), SparkConfig())
    assert asked is not None
    asked = with_files(asked, SparkConfig())
    shard_missing(here)  # both sides are on this machine
    found = asked_of_a_follower(asked, SparkConfig())["model.files"]
    assert (found.status, found.value) == ("note", "not here")
    assert "The leader sends it over the cable" in found.explanation
    off = asked_of_a_follower(with_files(asked, SparkConfig(model_sync="off")), SparkConfig())["model.files"]
    assert off.status == "problem"


def test_no_model_is_asked_about_by_default() -> None:
    port, outcome = visiting()
    connection = called(follower(port))
    send_report(connection, connection.expect(Kind.CHECK_REQUEST, timeout=30), SparkConfig(), "127.0.0.1")
    machine, _ = outcome.result(60)
    assert not [each for each in machine.findings if each.area == "model"]
