"""`vllm-spark bench calibrate`: the table that it writes is one that serving reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vllm_spark.cli import main
from vllm_spark.collective.launch_table import load_launch_table


@pytest.mark.parametrize("path", ["direct", "wire"])
def test_calibrate(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "launch.json"
    arguments = ["--path", path, "--rounds", "1", "--samples", "5", "--out", str(file)]
    assert main(["bench", "calibrate", *arguments]) == 0
    table = load_launch_table(file)
    assert table.gpu == torch.cuda.get_device_name()
    assert table.packet_kib is not None
    assert table.packet_kib >= 2, "packets are made for small messages"
    printed = capsys.readouterr().out
    for parameter in ("packet_threads", "dependent_launch", "payload_blocks", "payload_bytes_per_block", "way"):
        assert parameter in printed
