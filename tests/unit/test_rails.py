"""The RDMA ports that a user chooses: how they are named, and which they are."""

from __future__ import annotations

import ipaddress
import socket
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from vllm_spark import _native
from vllm_spark.collective import UsageError, local_ports, rails
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import ConfigurationError

FORM = "write DEVICE, DEVICE:PORT or DEVICE:PORT:GID_INDEX, such as mlx5_0:1:3"


@pytest.fixture(autouse=True)
def two_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """mlx5_0 and mlx5_1 with a port each, and two addresses on each port."""

    def found() -> list[tuple[str, int, bool, bool, int, list[tuple[int, bytes, int]]]]:
        addresses = [(3, bytes(10) + b"\xff\xff\x0a\0\0\1", 1), (5, bytes(10) + b"\xff\xff\x0a\0\1\1", 1)]
        return [(device, 1, True, True, 4096, list(addresses)) for device in ("mlx5_0", "mlx5_1")]

    monkeypatch.setattr(_native, "rdma_ports", found)


@pytest.mark.parametrize(
    ("choices", "addresses"),
    [
        ((), [("mlx5_0", 2), ("mlx5_1", 2)]),
        (("mlx5_1", "mlx5_0:1"), [("mlx5_1", 2), ("mlx5_0", 2)]),
        (("mlx5_1:1:5",), [("mlx5_1", 1)]),
    ],
)
def test_ports_come_as_they_were_chosen(choices: tuple[str, ...], addresses: list[Any]) -> None:
    assert [(port.device, len(port.addresses)) for port in local_ports(choices)] == addresses


@pytest.mark.parametrize(
    "choices", [("mlx5_0", "mlx5_0"), ("mlx5_0", "mlx5_0:1"), ("mlx5_0:1:3", "mlx5_1", "mlx5_0:1:5")]
)
def test_a_port_is_named_once(choices: tuple[str, ...]) -> None:
    """A port carries one rail, whatever it is called."""
    with pytest.raises(UsageError) as caught:
        local_ports(choices)
    assert str(caught.value) == f"the rails {', '.join(choices)} name port 1 of mlx5_0 twice; name each port once"


@pytest.mark.parametrize("looks_through", [False, True], ids=["older Python", "newer Python"])
def test_a_mapped_ipv4_address_is_of_its_network(looks_through: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of 169.254/16, whatever `is_link_local` says of it: both machines must find the same rails."""
    native = vars(ipaddress.IPv6Address)["is_link_local"].fget

    def is_link_local(address: ipaddress.IPv6Address) -> bool:
        mapped = address.ipv4_mapped
        return mapped.is_link_local and looks_through if mapped is not None else bool(native(address))

    monkeypatch.setattr(ipaddress.IPv6Address, "is_link_local", property(is_link_local))
    mapped = ipaddress.IPv6Address("::ffff:169.254.1.2").packed
    local = ipaddress.IPv6Address("fe80::1").packed
    monkeypatch.setattr(
        _native, "rdma_ports", lambda: [("mlx5_0", 1, True, True, 4096, [(1, local, 7), (3, mapped, 7)])]
    )
    entry = SimpleNamespace(address="169.254.1.2", netmask="255.255.0.0")
    monkeypatch.setattr(socket, "if_indextoname", lambda index: "enp1s0f0np0")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"enp1s0f0np0": [entry]})
    (port,) = local_ports()
    assert [address.network for address in port.addresses] == ["169.254.0.0/16", rails.LINK_LOCAL]


@pytest.mark.parametrize("rail", ["", ":1", "mlx5_0:", "mlx5_0:0", "mlx5_0:x", "mlx5_0:1:2:3", "mlx5 0"])
def test_settings_and_runtime_take_the_same_names(rail: str) -> None:
    with pytest.raises(UsageError) as runtimes:
        local_ports((rail,))
    with pytest.raises(ConfigurationError) as settings:
        SparkConfig.resolve(flags={"rails": f"mlx5_1,{rail}"}, environment={})
    assert str(runtimes.value) == f"{rail!r} is not an RDMA port; {FORM}"
    assert str(settings.value) == f"--spark-rails mlx5_1,{rail}: {runtimes.value}"
