"""What `vllm serve --spark` makes of its settings, without vLLM."""

from __future__ import annotations

import argparse

import pytest

from vllm_spark.config.settings import SparkConfig
from vllm_spark.entrypoints import serve


def test_flags_of_rank_1_beat_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun both ranks are started alike, and MASTER_ADDR names the leader."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLMSPARK_PORT", "1111")
    monkeypatch.setenv("VLLMSPARK_MAX_FRAME_MIB", "7")
    followed: list[tuple[SparkConfig, bool]] = []

    def supervise(config: SparkConfig, *, once: bool) -> int:
        followed.append((config, once))
        return 5

    monkeypatch.setattr("vllm_spark.entrypoints.join.supervise", supervise)
    with pytest.raises(SystemExit) as end:
        serve.serve(argparse.Namespace(spark=True, spark_port=2222), lambda args: None)
    assert end.value.code == 5
    ((config, once),) = followed
    assert (config.leader, config.port, config.max_frame_mib, once) == ("127.0.0.5", 2222, 7, True)
