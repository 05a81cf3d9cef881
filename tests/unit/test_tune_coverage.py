"""What `vllm-spark tune --check` says that serving uses on a GB10 for known models, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_spark.cli import main
from vllm_spark.files import configs_folder
from vllm_spark.kernels import lookup
from vllm_spark.kernels.devices import GB10
from vllm_spark.tune.coverage import Use, uses
from vllm_spark.tune.tables import new_tables, store_tables

from .tuning_outcomes import VERSIONS, W13, marlin

pytestmark = pytest.mark.usefixtures("user_tables")


def of(model: str, kernel: str) -> list[Use]:
    return [use for use in uses() if kernel == use.kernel and model in use.models]


def test_each_known_model_is_in_it() -> None:
    models = {model for use in uses() for model in use.models}
    for folder in (configs_folder() / "models").iterdir():
        config = json.loads((folder / "config.json").read_text())
        if any("experts" in key for key in (*config, *config.get("text_config", {}))):
            assert {f"{folder.name} TP=1", f"{folder.name} TP=2"} <= models
    for entry in json.loads((configs_folder() / "experts.json").read_text())["models"]:
        assert any(model.startswith(entry["name"]) for model in models), entry["name"]
        assert entry["source"]


def test_each_shape_has_a_reason_and_each_shipped_table_a_shape() -> None:
    found = uses()
    assert len({(use.kernel, use.shape) for use in found}) == len(found)
    assert all(use.what and use.why for use in found)
    tables = {path.name for path in lookup.table_files(GB10.name, "fused_moe")}
    assert {use.table.name for use in found if use.table is not None} == tables


def test_what_is_used_and_why() -> None:
    assert of("qwen3.5-122b-a10b-int4 TP=2", "Triton") == [], "a shape on Triton without a table"
    (int4,) = of("Laguna-S-2.1 int4 in groups of 32 TP=1", "Triton")
    assert int4.what == "4 rows published by vladimir-voinea/gb10-laguna-s-2.1-w4a16-moe 958e599 (grade A)"
    assert int4.why.endswith("with --moe-backend triton only, since vLLM runs such experts on Marlin by default")
    (smaller,) = of("Qwen3.5-35B-A3B-FP8 TP=1", "Triton")
    (larger,) = of("Qwen3.5-122B-A10B-FP8 TP=2", "Triton")
    assert smaller.table == larger.table is not None
    assert "measured with a model width of 3072" in smaller.why
    assert [use.what for use in of("qwen3.5-122b-a10b-int4 TP=2", "Marlin")] == ["vLLM's choice"] * 2
    (slower,) = of("Qwen3.6-35B-A3B bf16 TP=1", "Triton")
    assert (slower.table, slower.what) == (None, "vLLM's choice")
    assert "(grade A) is left out: slower than vLLM's default in serving" in slower.why
    assert of("gpt-oss-120b TP=2", "Marlin")[0].why.endswith("does not search MXFP4")
    (without,) = [use for use in uses() if "nvfp4" in use.shape]
    assert without.why == "vLLM reads no table for such weights"


def test_what_was_measured_here_is_used(user_tables: Path) -> None:
    (before, _) = of("qwen3-30b-a3b-int4 TP=2", "Marlin")
    assert before.table is None
    (path,) = store_tables(new_tables([marlin(1)], {}, GB10, VERSIONS), user_tables)
    lookup.clear_cache()
    (after,) = [use for use in of("qwen3-30b-a3b-int4 TP=2", "Marlin") if use.table is not None]
    assert W13.size_n == 768
    assert after.table == path
    assert after.what == "1 row measured on NVIDIA_GB10"


def test_the_command_prints_rows_by_provenance_and_what_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--check", "--no-compile", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["rows"]) == len(content["tables"])
    for table in content["rows"]:
        assert table["tuned"]
        for source in table["tuned"].values():
            assert (source["kind"], source["grade"]) == ("published", "A")
            assert source["source"]
    assert {use["what"] for use in content["uses"]} >= {"vLLM's choice"}
    assert {each["grade"] for each in content["left_out"]} == {"A", "B", "C", "X"}
    assert main(["tune", "--check", "--no-compile"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("Kolibri", "(grade A)", "On a GB10", "no measurement on a GB10 is published", "Left out"):
        assert words in shown, words


def test_folders_of_a_user_are_checked_without_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store_tables(new_tables([marlin(1)], {}, GB10, VERSIONS), tmp_path / "mine")
    assert main(["tune", "--check", str(tmp_path / "mine"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["uses"] == content["left_out"] == []
    assert content["rows"][0]["tuned"]["1"]["kind"] == "measured"
