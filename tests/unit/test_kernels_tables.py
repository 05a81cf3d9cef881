"""Files of tables: what is written is read, what is broken is one sentence, and defaults are vLLM's."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.devices import device_file_name
from vllm_spark.kernels.fused_moe.shapes import default_row
from vllm_spark.kernels.fused_moe.table import (
    FusedMoeProvenance,
    FusedMoeShape,
    FusedMoeTable,
    load_fused_moe_provenance,
    load_fused_moe_table,
    read_file_name,
    store_fused_moe_table,
)
from vllm_spark.kernels.marlin.table import MarlinRow, MarlinShape, MarlinTable, load_marlin_table, store_marlin_table
from vllm_spark.kernels.table import Provenance

DEFAULT = Provenance(kind="derived", rule="vllm-default")
MEASURED = Provenance(
    kind="measured",
    device="NVIDIA_GB10",
    date=datetime.date(2026, 11, 24),
    versions={"vllm": "0.33.0"},
    gain=0.042,
)
SHAPE = MarlinShape(
    kernel="moe_w13", experts=128, top_k=8, size_n=768, size_k=2048, group_size=128, quant_type="uint4b8"
)
ROWS = {
    1: MarlinRow(thread_k=128, thread_n=128, blocks_per_sm=1, block_size_m=8, provenance=MEASURED),
    8: MarlinRow(block_size_m=8, provenance=DEFAULT),
}
TABLE = MarlinTable(device="NVIDIA_GB10", shape=SHAPE, models=("a model TP=2",), rows=ROWS)
BLOCK = FusedMoeShape(128, 384, "fp8_w8a8", (128, 128))
SHAPES = (
    BLOCK,
    FusedMoeShape(128, 384, "fp8_w8a8", (64, 128)),
    FusedMoeShape(8, 704, "fp8_w8a8"),
    FusedMoeShape(128, 768),
    FusedMoeShape(64, 768),
)


def test_a_marlin_table_comes_back(tmp_path: Path) -> None:
    path = store_marlin_table(TABLE, tmp_path / "new")
    assert load_marlin_table(path) == TABLE
    assert path.name == (
        "kernel=moe_w13,E=128,top_k=8,N=768,K=2048,group_size=128,quant_type=uint4b8,device_name=NVIDIA_GB10.json"
    )
    assert list(path.parent.iterdir()) == [path], "no draft is left"


def test_the_nearest_row_up_to_the_largest() -> None:
    assert [TABLE.row(rows) is ROWS[key] for rows, key in ((1, 1), (4, 1), (5, 8), (8, 8))] == [True] * 4
    assert TABLE.row(9) is None, "larger steps stay vLLM's"


def test_steps_below_the_smallest_row_stay_vllms() -> None:
    table = TABLE.model_copy(update={"rows": {4: ROWS[1], 8: ROWS[8]}})
    assert [table.row(rows) for rows in (1, 3)] == [None, None]
    assert table.row(4) is ROWS[1]


@pytest.mark.parametrize(
    ("text", "change", "words"),
    [
        ('"1": {', '"01": {', "'01'"),
        ('"1": {', '"0": {', "'0'"),
        ('"1": {', f'"{10**12}": {{', "'1000000000000' is not a number of tokens from 1 to 1048576"),
        ('"1": {', f'"{"1" * 5000}": {{', "is not a number of tokens"),
        ("{", '{"a":' * 100_000, "nested too deeply"),
        ('"thread_k": 128', '"thread_k": "128"', "rows.1.thread_k"),
        ('"thread_k": 128', '"thread_k": true', "rows.1.thread_k"),
        ('"thread_n"', '"thread_k"', "'thread_k' occurs twice"),
        ('"device"', '"experts": 1, "device"', "experts"),
        ("moe_w13", "moe", "shape.kernel"),
        ('"size_n": 768', '"size_n": 0', "shape.size_n"),
        ("measured", "guessed", "provenance.kind"),
        ("{", "", "Extra data"),
    ],
)
def test_one_sentence_for_a_broken_marlin_table(tmp_path: Path, text: str, change: str, words: str) -> None:
    path = store_marlin_table(TABLE, tmp_path)
    content = path.read_text()
    assert text in content
    path.write_text(content.replace(text, change, 1))
    with pytest.raises(ConfigurationError) as caught:
        load_marlin_table(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="give a folder in which you may write"):
        store_marlin_table(TABLE, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_fused_moe_table_comes_back(tmp_path: Path) -> None:
    table = FusedMoeTable({1: default_row(BLOCK, 1), 16: default_row(BLOCK, 16)}, "3.9.0")
    provenance = FusedMoeProvenance(models=("a model",), rows={1: MEASURED, 16: DEFAULT})
    path = store_fused_moe_table(BLOCK, "NVIDIA_GB10", table, provenance, tmp_path)
    assert load_fused_moe_table(path) == table
    assert load_fused_moe_provenance(path) == provenance
    assert read_file_name(path.name) == (BLOCK, "NVIDIA_GB10")
    assert set(json.loads(path.read_text())) == {"triton_version", "1", "16"}, "other keys break vLLM"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"1": {"BLOCK_SIZE_M": 16}, "1": {}}', "'1' occurs twice"),
        ('{"x": {}}', "'x' is not a number"),
        ('{"0": {}}', "'0' is not a number"),
        (f'{{"{10**12}": {{}}}}', "'1000000000000' is not a number of tokens from 1 to 1048576"),
        (f'{{"{"1" * 5000}": {{}}}}', "is not a number of tokens"),
        (f'{{"1": {{"num_warps": {2**40}}}}}', "row 1"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"1": 3}', "row 1"),
        ('{"1": {"num_warps": 4.0}}', "row 1"),
        ('{"1": {"num_warps": true}}', "row 1"),
        ('{"triton_version": "3.9.0"}', "no rows"),
        ('{"triton_version": 3, "1": {}}', "triton_version"),
        ("[]", "not hold a JSON object"),
        ("{", "Expecting"),
    ],
)
def test_one_sentence_for_a_broken_fused_moe_table(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "E=1,N=2,device_name=NVIDIA_GB10.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        load_fused_moe_table(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", ["NVIDIA_GB10", "NVIDIA_H200"])
def test_names_of_files(shape: FusedMoeShape, device: str) -> None:
    assert read_file_name(shape.file_name(device)) == (shape, device)


def test_names_are_those_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed vLLM's own function, told another name of the device."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    remembered = fused_moe.get_device_name_as_file_name
    for driver_name in ("NVIDIA GB10", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB"):
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()
        monkeypatch.setattr(
            fused_moe.current_platform, "get_device_name", lambda *_, name=driver_name: name, raising=False
        )
        for shape in SHAPES:
            block = list(shape.block_shape) if shape.block_shape else None
            theirs = fused_moe.get_config_file_name(shape.experts, shape.size_n, shape.dtype, block)
            assert theirs == shape.file_name(device_file_name(driver_name))
    if hasattr(remembered, "cache_clear"):
        remembered.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_defaults_are_those_of_vllm(shape: FusedMoeShape) -> None:
    """The installed vLLM's own function, for every step up to some thousand tokens and around later changes."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    block = list(shape.block_shape) if shape.block_shape else None
    for tokens in (*range(1, 1200), 4096, 129 * shape.experts - 1, 129 * shape.experts, 65536):
        theirs = get_default_config(tokens, shape.experts, shape.size_n, 2048, 8, shape.dtype, block)
        assert default_row(shape, tokens) == theirs, tokens


@pytest.mark.parametrize(
    ("provenance", "missing"),
    [
        (MEASURED, []),
        (DEFAULT, []),
        (Provenance(kind="measured"), ["device", "date", "versions", "gain"]),
        (
            Provenance(kind="measured", **(MEASURED.model_dump(exclude={"kind"}) | {"versions": {"torch": "2"}})),
            ["versions.vllm"],
        ),
        (Provenance(kind="published"), ["source"]),
        (Provenance(kind="derived", rule=""), ["rule"]),
    ],
)
def test_what_a_provenance_lacks(provenance: Provenance, missing: list[str]) -> None:
    assert provenance.missing_fields() == missing
