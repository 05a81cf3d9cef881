"""What the engines get that compare tuned tables: a shard that vLLM would make, memory that is free, no pictures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.bench.decode import measurement as decode
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import configs_folder
from vllm_spark.models.layers import Dense, Layer, model_layers
from vllm_spark.models.shard import shard_as_model
from vllm_spark.tune import decode_comparison


def shipped(model: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((configs_folder() / "models" / model / "config.json").read_text())
    return content


def sizes(layers: list[Layer]) -> list[tuple[str, int, int]]:
    """Names and widths."""
    return [
        (x.name, x.size_n, x.size_k) if isinstance(x, Dense) else (x.name, x.hidden, x.intermediate) for x in layers
    ]


def test_a_vocabulary_that_vllm_pads() -> None:
    assert shard_as_model(shipped("qwen3-30b-a3b-int4") | {"vocab_size": 151937}, 2)["vocab_size"] == 75969


def test_a_width_counts_where_a_layer_has_it() -> None:
    """All layers are sparse; one that is not has the other width."""
    config = shipped("qwen3-30b-a3b-int4") | {"intermediate_size": 6145}
    assert sizes(model_layers(shard_as_model(config, 2), 1)) == sizes(model_layers(config, 2))
    with pytest.raises(ConfigurationError, match="intermediate_size is 6145, which 2 ranks cannot divide"):
        shard_as_model(config | {"mlp_only_layers": [0]}, 2)
    with pytest.raises(ConfigurationError, match="moe_intermediate_size is 767, which 2 ranks cannot divide"):
        shard_as_model(config | {"moe_intermediate_size": 767}, 2)


@pytest.mark.parametrize("change", [{"head_dim": None}, {"text_config": None}])
def test_null_is_nothing(change: dict[str, Any]) -> None:
    config = shipped("llama-3.3-70b-int4") | change
    shard = shard_as_model(config, 2)
    assert shard["head_dim"] == 128
    assert sizes(model_layers(shard, 1)) == sizes(model_layers(config, 2))


def job_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: dict[str, Any], **engine: Any) -> dict[str, Any]:
    """The arguments of the first engine that a comparison would start."""

    class Started(Exception):
        pass

    def started(title: str, command: list[str], log: str, environment: dict[str, str]) -> None:
        raise Started(command[-2])

    monkeypatch.setattr(decode, "_visible_gpus", lambda: ["0"])
    monkeypatch.setattr(decode, "_memory", lambda: (50 << 30, 100 << 30))
    given = decode_comparison.Settings(config, 2, tmp_path / "vllm-spark" / "tuned", engine=engine)
    programs: Any = SimpleNamespace(folder=tmp_path, started=started)
    with pytest.raises(Started) as caught:
        decode_comparison.compare(given, programs, lambda side, number: None, pytest.fail)
    arguments: dict[str, Any] = json.loads(Path(str(caught.value)).read_text())["engine"]
    return arguments


def test_an_engine_takes_of_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = shipped("qwen3-30b-a3b-int4")
    assert job_of(monkeypatch, tmp_path, config)["gpu_memory_utilization"] == 0.45
    asked = job_of(monkeypatch, tmp_path, config, gpu_memory_utilization=0.7)
    assert asked["gpu_memory_utilization"] == 0.7
    assert decode.memory_share(99 << 30, 100 << 30) < 0.9
    assert decode.memory_share(101 << 30, 100 << 30) == 0.9
    pair = decode.Settings("cuda", "any", ("tp1", "spark"))
    assert "gpu_memory_utilization" not in decode._engine_arguments(pair, tmp_path)


def test_a_model_that_sees_runs_as_its_language_model_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shard's folder has no preprocessor's files."""
    seeing = shipped("qwen3.5-35b-a3b-int4")
    assert job_of(monkeypatch, tmp_path, seeing)["language_model_only"] is True
    assert job_of(monkeypatch, tmp_path, seeing, language_model_only=False)["language_model_only"] is False
    assert "language_model_only" not in job_of(monkeypatch, tmp_path, shipped("qwen3-30b-a3b-int4"))


def test_a_disk_that_is_full_costs_a_sentence(tmp_path: Path) -> None:
    """As far as a test can have one: a file is where the folder would be."""
    (tmp_path / "shard").write_text("")
    given = decode_comparison.Settings(shipped("qwen3-30b-a3b-int4"), 2, tmp_path / "vllm-spark" / "tuned")
    programs: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(ConfigurationError, match=r"shard/config\.json cannot be written"):
        decode_comparison.compare(given, programs, lambda side, number: None, pytest.fail)
    programs = SimpleNamespace(folder=tmp_path / "shard")
    untuned = decode.candidates_for("cuda")["untuned"]
    with pytest.raises(ConfigurationError, match=r"untuned-0\.job\.json cannot be written"):
        decode._run("untuned", untuned, tmp_path, decode.Settings("cuda", "any", ("tp1",)), programs, 0)
