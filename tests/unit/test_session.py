"""What both ranks do alike: settings become the runtime's options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from vllm_spark import _native
from vllm_spark.collective import Runtime, RuntimeOptions, Transport
from vllm_spark.collective.launch_table import LaunchTable
from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures, store_wire_model
from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import ConfigurationError
from vllm_spark.executor.bootstrap import modelled_wire, runtime_options
from vllm_spark.ranks import RANKS, WORLD_SIZE

from .wires import wire_file, wire_model

CONTEXT: dict[str, dict[str, Any]] = {
    "loopback_latency_us": {"loopback_mode": "proxied"},
    "loopback_gbytes_per_s": {"loopback_mode": "proxied"},
    "packet_kib": {"slot_kib": 65536},
    "slot_kib": {"packet_kib": 0},
}
"""What else must be set for an extreme value of a setting to make sense."""


def extremes() -> Iterator[tuple[str, Any]]:
    """The least and the greatest value of every setting that is a number, and each choice of the others."""
    for name, field in SparkConfig.model_fields.items():
        for choice in get_args(field.annotation):
            if isinstance(choice, str):
                yield name, choice
        for bound in field.metadata:
            if (least := getattr(bound, "ge", None)) is not None:
                yield name, least
            if (below := getattr(bound, "gt", None)) is not None:
                yield name, math.nextafter(below, math.inf)
            if (greatest := getattr(bound, "le", None)) is not None:
                yield name, greatest


@pytest.mark.parametrize(("name", "value"), [pytest.param(*each, id="-".join(map(str, each))) for each in extremes()])
def test_whatever_settings_take_the_runtime_takes(name: str, value: Any) -> None:
    config = SparkConfig.resolve(flags={**CONTEXT.get(name, {}), name: value}, environment={})
    for transport in get_args(Transport):
        if (transport, config.loopback_mode) != ("verbs", "proxied"):
            options = runtime_options(config, LaunchTable(), transport, config.rails, modelled_wire(config))
            Runtime._make_native(0, replace(options, packet_bytes=options.packet_bytes or 0), stripes=1)


def test_numbers_of_both_are_walked_over() -> None:
    """So that a setting without bounds would be missed above."""
    walked = {name for name, _ in extremes()}
    numbers = {
        "traffic_class",
        "service_level",
        "depth",
        "slot_kib",
        "packet_kib",
        "link_timeout",
        "rail_timeout",
        "collective_timeout",
    }
    assert numbers | {"loopback_latency_us", "loopback_gbytes_per_s", "transport", "loopback_mode"} <= walked
    known = {field.name for field in fields(RuntimeOptions)}
    both = known & SparkConfig.model_fields.keys()
    assert both - walked == {"rails", "wire"}, "names and a file, not numbers"


@pytest.mark.parametrize("name", ["link_timeout", "rail_timeout", "collective_timeout"])
def test_a_time_that_no_clock_of_the_runtime_can_measure(name: str) -> None:
    flag = f"--spark-{name.replace('_', '-')}"
    with pytest.raises(ConfigurationError, match=rf"^{flag} 0\.0005 is invalid: must be a number from 0\.001 to "):
        SparkConfig.resolve(flags={name: 0.0005}, environment={})


def test_a_pair_is_as_large_as_the_runtime() -> None:
    assert (WORLD_SIZE, tuple(range(WORLD_SIZE))) == (_native.WORLD_SIZE, RANKS)


def test_a_file_sets_the_modelled_link(tmp_path: Path) -> None:
    path = wire_file(tmp_path / "wire.json", 1.5, 20.25)
    config = SparkConfig.resolve(flags={"wire": path, "loopback_mode": "proxied"}, environment={})
    wire = modelled_wire(config)
    assert wire == wire_model(1.5, 20.25).figures()
    assert runtime_options(config, LaunchTable(), "loopback", None, wire).wire == wire
    assert runtime_options(config, LaunchTable(), "verbs", None, wire).wire is None
    store_wire_model(PUBLISHED_FIGURES, path)
    assert modelled_wire(config) == PUBLISHED_FIGURES, "a file of figures alone"


def test_two_numbers_set_a_modelled_link_of_one_rail() -> None:
    numbers = {"loopback_latency_us": 1.5, "loopback_gbytes_per_s": 20.25}
    config = SparkConfig.resolve(flags={**numbers, "loopback_mode": "proxied"}, environment={})
    assert modelled_wire(config) == WireFigures.alpha_beta(1.5, 20.25)
    assert modelled_wire(SparkConfig.resolve(flags={"loopback_mode": "proxied"}, environment={})) is None


@pytest.mark.parametrize("file", ["/no/such/wire", "~no-such-user/wire"])
def test_a_wire_model_that_is_not_there(file: str) -> None:
    config = SparkConfig.resolve(flags={"wire": file, "loopback_mode": "proxied"}, environment={})
    with pytest.raises(ConfigurationError, match=f"the wire model {file} cannot be read .*bench wire"):
        modelled_wire(config)
