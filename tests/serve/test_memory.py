"""Memory on both machines: what does not fit is refused, growth is stopped in time, page cache is given back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import notices
from tests.page_cache import cached
from vllm_spark.errors import EXIT_REFUSED
from vllm_spark.memory.scopes import GIB
from vllm_spark.models.tiny import HIDDEN, LAYERS, make_tiny_model
from vllm_spark.ranks import FOLLOWER_RANK, LEADER_RANK

from .cgroups import CannotMakeCgroups, MemoryCgroup, memory_cgroup
from .development import DEVELOPMENT, EXTENSION, call
from .hosts import Hosts
from .servers import START_SECONDS, spark_tp2

LIMIT = 4 * GIB
STOP_SECONDS = 60.0
WIDE = 65536
"""Intermediate size of a model whose weights are large enough to be seen in the page cache: 400 MB in bfloat16."""
LEADER = pytest.param(LEADER_RANK, id="leader")
FOLLOWER = pytest.param(FOLLOWER_RANK, id="follower", marks=pytest.mark.thorough)


@pytest.fixture
def small(pytestconfig: pytest.Config) -> Iterator[MemoryCgroup]:
    """A cgroup of 4 GiB; skips the test, and says so at the end of the run, where none can be made."""
    try:
        with memory_cgroup(LIMIT) as made:
            yield made
    except CannotMakeCgroups as error:
        notices.add(pytestconfig, "MEMORY WITHOUT CGROUPS", f"{error}: nothing was tested where memory runs out.")
        pytest.skip(f"needs memory cgroups: {error}")


@pytest.mark.parametrize("rank", [LEADER, FOLLOWER])
def test_a_start_that_does_not_fit_is_refused_with_the_sum(
    namespaces: Hosts, small: MemoryCgroup, tmp_path: Path, rank: int
) -> None:
    """Twelve GiB of weights, as far as the file system says: nothing reads them before both have the memory."""
    model = make_tiny_model(tmp_path / "large", "dense")
    os.truncate(model / "model.safetensors", 12 * GIB)
    with namespaces[rank].within(small), spark_tp2(namespaces, model, wait=False) as server:
        small_side = server.processes[rank]
        refusal = small_side.wait_for_line(
            r"start does not fit into the memory of \S+: 13\.8 GiB \(weights 12\.0, KV cache 1\.0, "
            r"graphs and activations 0\.25, region 0\.0\d, kept free 0\.50\) are more than the [23]\.\d of 4\.0 GiB "
            rf"that are available in the cgroup {re.escape(small.cgroup.name)}; end other programs on \S+, or serve a "
            "smaller model, or one with fewer bits for each weight",
            START_SECONDS,
        )
        if rank == LEADER_RANK:
            assert server.leader.wait(STOP_SECONDS) == EXIT_REFUSED
            assert f"vllm serve --spark: the {refusal[0]}." in server.leader.output()
        else:
            server.leader.wait_for_line(f"does not fit: the {re.escape(refusal[0])}. Still waiting", STOP_SECONDS)
        assert "Loading safetensors" not in server.leader.output() + server.follower.output()  # type: ignore[union-attr]
    assert small.oom_kills() == 0


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [LEADER, FOLLOWER])
def test_growth_is_stopped_before_the_kernel_acts(
    namespaces: Hosts, small: MemoryCgroup, tiny_dense: Path, rank: int
) -> None:
    with namespaces[rank].within(small), spark_tp2(namespaces, tiny_dense, EXTENSION, DEVELOPMENT) as server:
        call(server, "grow_on", rank)
        stopped = server.processes[rank].wait_for_line(
            r"the memory of \S+ runs out: (0\.\d+|0) of 4\.0 GiB are available in the cgroup "
            rf"{re.escape(small.cgroup.name)}, and the guard keeps 0\.50 GiB free",
            STOP_SECONDS,
        )
        assert re.search(
            r"Memory runs short: (0\.\d+|1\.0) of 4\.0 GiB", server.processes[rank].output()[: stopped.start()]
        )
        other = server.processes[FOLLOWER_RANK if rank == LEADER_RANK else LEADER_RANK]
        other.wait_for_line(re.escape(stopped[0]), STOP_SECONDS)
        assert server.leader.wait(STOP_SECONDS) == 1
        assert re.search(rf"vllm serve --spark: .*{re.escape(stopped[0])}", server.leader.output())
        assert server.follower is not None
        server.follower.wait_for_line(r"(?s)Ready: this machine.*Waiting for a leader at", STOP_SECONDS)
        assert small.oom_kills() == 0


def test_the_page_cache_is_given_back(hosts: Hosts, tmp_path: Path) -> None:
    model = wide_model(tmp_path / "wide")
    files = sorted(model.glob("*.safetensors"))
    assert len(files) == LAYERS + 1
    for file in files:
        file.read_bytes()
    size = sum(file.stat().st_size for file in files)
    assert cached(files) > 0.95 * size, "what is measured can be seen"
    with spark_tp2(hosts, model):
        share = cached(files) / size
    print(f"page cache after loading: {share:.2%} of {size / 1e6:.0f} MB")
    assert share < 0.05


def wide_model(folder: Path) -> Path:
    """A dense model with a weight file for each layer."""
    make_tiny_model(folder, "dense")
    single = folder / "model.safetensors"
    weights = load_file(single)
    single.unlink()
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": WIDE}
    (folder / "config.json").write_text(json.dumps(config))
    index: dict[str, str] = {}
    for part in range(LAYERS + 1):
        name = f"model-{part}.safetensors"
        mine = {
            key: _widened(key, tensor)
            for key, tensor in weights.items()
            if key.startswith(f"model.layers.{part}.") or (part == LAYERS and ".layers." not in key)
        }
        save_file(mine, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(mine, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    os.sync()  # pages that are to be written cannot be evicted
    return folder


def _widened(key: str, tensor: torch.Tensor) -> torch.Tensor:
    if ".mlp." not in key:
        return tensor
    return torch.zeros((HIDDEN, WIDE) if "down_proj" in key else (WIDE, HIDDEN), dtype=tensor.dtype)
