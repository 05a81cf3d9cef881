"""Addresses of the link: where the leader listens, and which ports and interfaces there are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import ConfigurationError
from vllm_spark.executor.bootstrap import use_link_interface
from vllm_spark.executor.channel.addresses import leader_address, resolve_master, source_address
from vllm_spark.executor.channel.rdma_ports import rdma_ports


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torchrun's variables of rank 0."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.5"}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_rank_0_of_a_launcher_listens_where_rank_1_looks(launcher: pytest.MonkeyPatch) -> None:
    assert leader_address(SparkConfig()) == "127.0.0.5"
    assert leader_address(SparkConfig(address="127.0.0.6")) == "127.0.0.6", "what is set counts more"
    launcher.setenv("MASTER_ADDR", "localhost")
    assert leader_address(SparkConfig()) == "127.0.0.1"


@pytest.mark.parametrize("change", [{"RANK": "1"}, {"WORLD_SIZE": "1"}, {"MASTER_ADDR": ""}])
def test_without_a_launcher_its_variables_do_not_count(launcher: pytest.MonkeyPatch, change: dict[str, str]) -> None:
    launcher.setattr("vllm_spark.executor.channel.addresses._rdma_addresses", list)
    for name, value in change.items():
        launcher.setenv(name, value)
    assert leader_address(SparkConfig()) == "127.0.0.1"


def test_an_address_of_another_machine(launcher: pytest.MonkeyPatch) -> None:
    launcher.setenv("MASTER_ADDR", "192.0.2.1")
    with pytest.raises(ConfigurationError, match=r"MASTER_ADDR=192\.0\.2\.1 is not an address of this .* 127\.0\.0\.1"):
        leader_address(SparkConfig())


def test_names_are_resolved() -> None:
    assert resolve_master("localhost")[0] == "127.0.0.1"
    assert resolve_master("192.0.2.1") == ["192.0.2.1"]
    for name in ("no-such-host.invalid", "x" * 300):
        with pytest.raises(ConfigurationError, match=f"MASTER_ADDR={name} cannot be resolved here"):
            resolve_master(name)


@pytest.mark.parametrize(
    ("master", "kind"), [("0.0.0.0", "the wildcard"), ("::", "the wildcard"), ("224.0.0.1", "a multicast")]
)
def test_an_address_that_no_single_machine_has(master: str, kind: str) -> None:
    with pytest.raises(ConfigurationError, match=f"MASTER_ADDR={master} is {kind} address; set it to the IP address"):
        resolve_master(master)


def test_vllm_listens_at_the_links_address_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_HOST_IP", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    interface = use_link_interface("127.0.0.1")
    assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"
    interface.restore()
    assert "VLLM_HOST_IP" not in os.environ
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.2")
    use_link_interface("127.0.0.1").restore()
    assert os.environ["VLLM_HOST_IP"] == "127.0.0.2"


def test_the_address_towards_a_peer() -> None:
    assert source_address("127.0.0.5") == "127.0.0.1"
    assert source_address("::1") in ("::1", None)  # None where IPv6 is disabled


def test_rdma_ports_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    assert rdma_ports(tmp_path) == []
    for port, entries in {"mlx5_1/ports/1": ["", "enp1s0"], "mlx5_0/ports/2": [], "mlx5_0/ports/1": ["enp2s0"]}.items():
        folder = tmp_path / "sys/class/infiniband" / port / "gid_attrs/ndevs"
        folder.mkdir(parents=True)
        for index, interface in enumerate(entries):
            (folder / str(index)).write_text(f"{interface}\n")
    assert rdma_ports(tmp_path) == [("mlx5_0", 1, "enp2s0"), ("mlx5_0", 2, ""), ("mlx5_1", 1, "enp1s0")]
