"""`vllm-spark tune MODEL`: options, and what bad input costs."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_spark.cli import tune as tune_command
from vllm_spark.errors import ConfigurationError

from .folder_rights import no_entry
from .tuning_outcomes import (
    shipped,
)


def tune(*words: str) -> int:
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    return tune_command.run(parser.parse_args(words))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Folder with a config.json of each kind that is asked for below."""
    known = shipped("qwen3-30b-a3b-int4")
    for name, content in {
        "unknown": {"model_type": "mamba9", "num_hidden_layers": 2},
        "list": [1, 2],
        "awq": {**known, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
        "dense": {**known, "num_experts": 8, "num_experts_per_tok": 8},
        "gguf": {**known, "quantization_config": {"quant_method": "gguf"}},
        "ordered": {**known, "quantization_config": {**known["quantization_config"], "desc_act": True}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    for name, text in (("broken", '{"model_type":'), ("deep", "[" * 100_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):
        (tmp_path / name / "model").mkdir(parents=True)
        unquantized = {key: value for key, value in known.items() if key != "quantization_config"}
        (tmp_path / name / "model" / "config.json").write_text(json.dumps(unquantized))
        (tmp_path / name / "model" / name).write_text('{"bits": 4}')
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{models}/unknown"], ["mamba9", "supported are", "qwen3_moe"]),
        (["{models}/broken"], ["broken/config.json", "is not valid JSON"]),
        (["{models}/list"], ["does not hold a JSON object"]),
        (["{models}/deep"], ["deep/config.json", "is not valid JSON"]),
        (["x" * 300], ["x" * 300, "File name too long", "qwen3-30b-a3b-int4"]),
        (
            ["{models}/quantize_config.json/model"],
            ["quantize_config.json may say how the weights are quantized", "as quantization_config"],
        ),
        (["{models}/quant_config.json/model"], ["quant_config.json may say how the weights are quantized"]),
        (["{models}/hf_quant_config.json/model"], ["hf_quant_config.json may say how the weights are quantized"]),
        (["{models}/gguf"], ["gguf", "gptq"]),
        (["./no/such/model"], ["./no/such/model", "qwen3-30b-a3b-int4"]),
        (["qwen3-30b-a3b-int4", "--tp", "5"], ["5 ranks"]),
        (["llama-3.3-70b-int4"], ["nothing to tune in llama-3.3-70b-int4"]),
        (["gpt-oss-120b", "--kernels", "triton"], ["nothing to tune in gpt-oss-120b"]),
        (["{models}/awq", "--kernels", "triton"], ["AWQ", "--kernels triton"]),
        (["{models}/ordered", "--kernels", "triton"], ["desc_act", "--kernels triton"]),
        (["qwen3-30b-a3b-int4", "--out", "{models}/file/tuned"], ["file/tuned cannot be written", "--out"]),
        (["qwen3-30b-a3b-int4", "--out", "{models}/file"], ["file cannot be written", "--out"]),
        (["qwen3-30b-a3b-int4", "--out", "{models}/new", "--plot", "{models}/nowhere/plot.png"], ["nowhere/plot.png"]),
        (["qwen3-30b-a3b-int4", "--out", "{models}/new", "--keep-logs", "{models}/file/x"], ["file/x", "--keep-logs"]),
        (["{models}/dense", "--out", "{models}/new", "--rows", "8"], ["for 8 tokens", "leave --rows out"]),
    ],
)
def test_bad_input_costs_a_sentence(models: Path, words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        tune(*(word.format(models=models) for word in words))
    assert caught.value.exit_code == 2
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in parts:
        assert part in sentence
    assert not (models / "new").exists(), "nothing is made for a command that fails"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--rows", "9"], "9 is more than 8 tokens"),
        (["--rows", "0"], "'0' is not a whole number above 0"),
        (["--tp", "two"], "'two' is not a whole number above 0"),
        (["--tp", "0"], "'0' is not a whole number above 0"),
        (["--kernels", "cutlass"], "cutlass"),
        (["--engine", "{"], "is not a JSON object"),
        (["--out=~nobody-of-this-name/x"], "no home folder for '~nobody-of-this-name/x'"),
    ],
)
def test_bad_options_are_explained(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tune("qwen3-30b-a3b-int4", *words)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--plot", "--keep-logs"])
def test_a_home_folder_is_found_where_the_shell_does_not_look(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    given = vars(parser.parse_args(["any", f"{option}=~/x"]))
    assert given[option.removeprefix("--").replace("-", "_")] == Path("/home/of/mine/x")


def test_a_shard_that_cannot_be_made_is_said_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any, tp: int) -> None:
        raise ConfigurationError("it does not divide")

    monkeypatch.setattr("vllm_spark.tune.plan.shard_as_model", refuse)
    words = ["qwen3-30b-a3b-int4", "--out", str(tmp_path / "new")]
    with pytest.raises(ConfigurationError, match="does not divide"):
        tune(*words)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["{private}/model"], "private/model cannot be read (Permission denied); give"),
        (
            ["qwen3-30b-a3b-int4", "--out", "{private}/tuned"],
            "private/tuned cannot be written (Permission denied); give",
        ),
    ],
)
def test_a_folder_without_rights_costs_a_sentence(tmp_path: Path, words: list[str], part: str) -> None:
    private = tmp_path / "private"
    private.mkdir()
    with no_entry(private), pytest.raises(ConfigurationError, match=re.escape(part)):
        tune(*(word.format(private=private) for word in words))


def test_a_check_does_not_pass_over_tables_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "private" / "tuned").mkdir(parents=True)
    assert tune_command._may_be_there(tmp_path / "private" / "tuned")
    assert not tune_command._may_be_there(tmp_path / "private" / "other")
    with no_entry(tmp_path / "private"):
        assert tune_command._may_be_there(tmp_path / "private" / "tuned")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("words", [[], ["--kernels", "triton"]])
def test_a_machine_without_a_gpu_is_told(tmp_path: Path, words: list[str]) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(ConfigurationError, match="needs a GPU") as caught:
        tune("qwen3-30b-a3b-int4", "--out", str(tmp_path / "new"), *words)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_errors_come_before_anything_slow(tmp_path: Path) -> None:
    program = """
import argparse, sys
from vllm_spark.cli import tune as tune_command
from vllm_spark.errors import ConfigurationError
parser = argparse.ArgumentParser()
tune_command.add_arguments(parser)
try:
    tune_command.run(parser.parse_args(["qwen3-30b-a3b-int4", "--out", sys.argv[1]]))
except ConfigurationError as error:
    print(error)
print([name for name in ("torch", "vllm", "triton") if name in sys.modules])
"""
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "file")], capture_output=True, text=True, timeout=300, check=True
    )
    sentence, loaded = done.stdout.splitlines()
    assert "cannot be written" in sentence
    assert loaded == "[]"
