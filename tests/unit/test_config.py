"""Settings: where they come from, which win, and how a bad one is explained."""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spark.cli.config import reference
from vllm_spark.config.settings import (
    SparkConfig,
    add_flags,
    enabled_by_environment,
    flag_name,
    given_flags,
    split_endpoint,
    typed_flags,
)
from vllm_spark.errors import ConfigurationError
from vllm_spark.variables import variable_name

from .wires import wire_file

ROOT = Path(__file__).parents[2]
WIRES = tempfile.TemporaryDirectory(prefix="vllm-spark-wires-")  # gone when the tests end


def wire(latency_us: float) -> Path:
    return wire_file(Path(WIRES.name) / f"{latency_us}.json", latency_us, 24.0)


# Three different good values of every setting: for the file, the environment and the flag.
GOOD: dict[str, tuple[Any, Any, Any]] = {
    "address": ("10.0.0.1", "10.0.0.2", "10.0.0.3"),
    "leader": ("10.0.0.1", "10.0.0.2:5", "[fe80::1]:7"),
    "port": (1000, 2000, 3000),
    "secret_file": (Path("/a"), Path("/b"), Path("/c")),
    "join_timeout": (1.0, 2.0, 3.0),
    "model_sync": ("auto", "off", "auto"),
    "model_path": ("a=/x", "org/model=/models/a,/b=/c", "c=/y"),
    "reserve_memory": (0.0, 4.0, 8.5),
    "heartbeat_timeout": (1.0, 2.0, 3.0),
    "collective_timeout": (1.0, 2.0, 3.0),
    "max_frame_mib": (1, 2, 3),
    "transport": ("auto", "verbs", "loopback"),
    "rails": ("mlx5_0", "mlx5_0:1", "mlx5_0:1:3,mlx5_1"),
    "link_timeout": (1.0, 2.0, 3.0),
    "rail_timeout": (1.0, 2.0, 3.0),
    "traffic_class": (1, 2, 3),
    "service_level": (1, 2, 3),
    "loopback_mode": ("direct", "proxied", "direct"),
    "loopback_latency_us": (1.0, 2.0, 3.0),
    "loopback_gbytes_per_s": (1.0, 2.0, 3.0),
    "wire": (wire(1.0), wire(2.0), wire(3.0)),
    "slot_kib": (64, 128, 256),
    "packet_kib": (1, 2, 4),
    "launch_table": (Path("/a"), Path("/b"), Path("/c")),
    "depth": (1, 2, 8),
    "trace": ("off", "on", "off"),
}


def neutral(name: str) -> dict[str, Any]:
    """What else must be set for `name` to make sense alone."""
    needs_the_proxy = name in ("loopback_latency_us", "loopback_gbytes_per_s", "wire")
    return {"loopback_mode": "proxied"} if needs_the_proxy else {}


def test_every_setting_is_covered_here() -> None:
    assert GOOD.keys() == SparkConfig.model_fields.keys()


@pytest.mark.parametrize("name", GOOD)
def test_a_flag_beats_the_environment_beats_a_file(name: str) -> None:
    file, environment, flag = GOOD[name]
    base = neutral(name)

    def resolve(**sources: Any) -> Any:
        config = SparkConfig.resolve(
            file={**base, **sources.get("file", {})},
            environment=sources.get("environment", {}),
            flags=sources.get("flags", {}),
        )
        return getattr(config, name)

    default = SparkConfig.model_fields[name].default
    assert resolve() == (base.get(name, default))
    assert resolve(file={name: file}) == file
    variable = {variable_name(name): str(environment)}
    assert resolve(file={name: file}, environment=variable) == environment
    assert resolve(file={name: file}, environment=variable, flags={name: flag}) == flag


@pytest.mark.parametrize(
    ("sources", "parts"),
    [
        ({"flags": {"port": 0}}, ["--spark-port 0 is invalid: must be a whole number from 1 to 65535"]),
        (
            {"environment": {"VLLMSPARK_PORT": "http"}},
            ["VLLMSPARK_PORT http is invalid: must be a whole number from 1 to 65535"],
        ),
        (
            {"environment": {"VLLMSPARK_PORT": "tcp://10.96.0.7:29650"}},
            ["VLLMSPARK_PORT tcp://10.96.0.7:29650: it is not a port", "Kubernetes", "enableServiceLinks: false"],
        ),
        ({"flags": {"heartbeat_timeout": 0.1}}, ["--spark-heartbeat-timeout 0.1", "a number from 0.5 to 3600"]),
        ({"flags": {"heartbeat_timeout": "nan"}}, ["--spark-heartbeat-timeout nan", "a number from 0.5 to 3600"]),
        ({"flags": {"join_timeout": -1}}, ["--spark-join-timeout -1 is invalid", "above 0 and at most 86400"]),
        ({"flags": {"packet_kib": 1.5}}, ["--spark-packet-kib 1.5 is invalid", "a whole number from 0 to 1024"]),
        ({"file": {"loopback_latency_us": "x"}}, ["loopback_latency_us x is invalid", "a number from 0 to 1000000"]),
        ({"flags": {"rails": ""}}, ["--spark-rails '': it is empty", "leave it out"]),
        ({"flags": {"rails": "mlx5_0,mlx5_0"}}, ["--spark-rails mlx5_0,mlx5_0: it has port 1 of mlx5_0 twice"]),
        ({"environment": {"VLLMSPARK_RAILS": "mlx5_1, mlx5_1:1:3"}}, ["port 1 of mlx5_1 twice", "each port once"]),
        (
            {"flags": {"leader": "10.0.0.1:29650", "port": 29651}},
            ["--spark-leader 10.0.0.1:29650 and --spark-port 29651", "leave one of them out"],
        ),
        (
            {"environment": {"VLLMSPARK_LEADER": "[fe80::1]:29650"}, "flags": {"port": 29651}},
            ["VLLMSPARK_LEADER [fe80::1]:29650 and --spark-port 29651"],
        ),
        (
            {"flags": {"model_path": "/models/a"}},
            ["--spark-model-path /models/a: '/models/a' is not NAME=FOLDER; give"],
        ),
        (
            {"flags": {"model_path": "a=/x,a=/y"}},
            ["--spark-model-path a=/x,a=/y: it has 'a' twice; give each name once"],
        ),
        ({"flags": {"model_sync": "on"}}, ["--spark-model-sync on", "'auto' or 'off'"]),
        ({"environment": {"VLLMSPARK_TRANSPORT": "ib"}}, ["VLLMSPARK_TRANSPORT ib", "'auto', 'verbs' or 'loopback'"]),
        ({"flags": {"address": "spark-1"}}, ["--spark-address spark-1", "not an IP address"]),
        ({"flags": {"leader": ""}}, ["--spark-leader '': it is empty", "or leave it out"]),
        ({"flags": {"leader": "0.0.0.0"}}, ["'0.0.0.0' is the wildcard address, not the address of one machine"]),
        ({"flags": {"leader": "[::]:29650"}}, ["'::' is the wildcard address"]),
        ({"flags": {"leader": "::ffff:0.0.0.0"}}, ["'::ffff:0.0.0.0' is the wildcard address"]),
        ({"flags": {"leader": "224.0.0.1:29650"}}, ["'224.0.0.1' is a multicast address"]),
        ({"flags": {"leader": "255.255.255.255"}}, ["'255.255.255.255' is the broadcast address"]),
        ({"flags": {"address": "ff02::1"}}, ["'ff02::1' is a multicast address", "10.0.0.1"]),
        ({"flags": {"address": "10.0.0.1:5"}}, ["has a port", "--spark-port"]),
        ({"flags": {"leader": "10.0.0.1:99999"}}, ["99999", "1 to 65535"]),
        ({"flags": {"depth": 3}}, ["--spark-depth 3", "power of two"]),
        ({"file": {"adress": "x"}}, ["additional_config has 'adress'", "the most similar one is 'address'"]),
        ({"file": {"zzz": 1}}, ["has 'zzz', and there is no such setting", "vllm-spark config"]),
        ({"flags": {"loopback_latency_us": 3.0}}, ["needs the proxy", "--spark-loopback-mode proxied"]),
        ({"flags": {"wire": GOOD["wire"][0]}}, ["needs the proxy", "leave out --spark-wire"]),
        (
            {"flags": {"wire": "/no/such/wire"}},
            ["--spark-loopback-mode proxied", "--spark-wire /no/such/wire does not exist"],
        ),
        ({"file": {"wire": 5}}, ["wire 5", "path"]),
        ({"file": {"launch_table": "a\0b"}}, ["launch_table a", "NUL"]),
        (
            {"flags": {"wire": GOOD["wire"][0], "loopback_mode": "proxied", "loopback_latency_us": 3.0}},
            ["--spark-wire and --spark-loopback-latency-us contradict each other"],
        ),
        (
            {"flags": {"wire": GOOD["wire"][0]}, "environment": {"VLLMSPARK_LOOPBACK_GBYTES_PER_S": "3"}},
            ["--spark-wire and --spark-loopback-gbytes-per-s contradict each other"],
        ),
        ({"flags": {"transport": "verbs", "loopback_mode": "proxied"}}, ["contradict"]),
        ({"flags": {"packet_kib": 8, "slot_kib": 4}}, ["--spark-packet-kib 8", "--spark-slot-kib 4"]),
    ],
)
def test_a_bad_setting_is_explained_in_one_sentence(sources: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SparkConfig.resolve(**{"environment": {}, **sources})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "sources",
    [
        {"flags": {"leader": "10.0.0.1:29651", "port": 29651}},
        {"flags": {"leader": "10.0.0.1:29650"}, "environment": {"VLLMSPARK_PORT": "29651"}},
        {"flags": {"leader": "10.0.0.1", "port": 29651}},
        {
            "file": {"leader": "10.0.0.1:1", "port": 29651},
            "environment": {"VLLMSPARK_LEADER": "10.0.0.1:29652"},
        },
    ],
    ids=["the same", "a flag overrides the environment", "no port in the address", "the environment overrides a file"],
)
def test_a_leaders_address_may_have_its_port(sources: dict[str, Any]) -> None:
    config = SparkConfig.resolve(**{"environment": {}, **sources})
    assert config.leader == sources.get("flags", {}).get(
        "leader", sources.get("environment", {}).get("VLLMSPARK_LEADER")
    )


@pytest.mark.parametrize("name", SparkConfig.model_fields)
def test_a_range_is_that_of_the_setting(name: str) -> None:
    """Each setting that is a number names both ends of its range, in one style of placeholder."""
    field = SparkConfig.model_fields[name]
    numbers = [part for part in field.metadata if hasattr(part, "le")]
    if not numbers:
        return
    with pytest.raises(ConfigurationError) as caught:
        SparkConfig.resolve(flags={name: "nan"}, environment={})
    most = numbers[0].le
    assert re.search(rf" nan is invalid: must be a (whole )?number (from|above) \S+ .*\b{most:.0f}$", str(caught.value))


def test_placeholders_are_of_one_style() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, ["leader", "follower", "both"])
    names = {action.dest: action.metavar for action in parser._actions if action.dest.startswith("spark_")}
    assert {names[f"spark_{name}"] for name in names_of("_timeout")} == {"SECONDS"}
    assert {names[f"spark_{name}"] for name in names_of("_kib")} == {"KIB"}
    assert all(names.values())


def names_of(end: str) -> list[str]:
    return [name for name in SparkConfig.model_fields if name.endswith(end)]


@pytest.mark.parametrize("name", ["secret_file", "launch_table", "wire"])
def test_a_file_of_a_user_who_does_not_exist(name: str) -> None:
    """Whoever reads it says that it is not there."""
    settings = {name: "~no-such-user/file", "loopback_mode": "proxied"}
    config = SparkConfig.resolve(flags=settings, environment={})
    assert getattr(config, name) == Path("~no-such-user/file")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="test")
    add_flags(made, ["leader", "follower", "both"])
    return made


@pytest.mark.parametrize("name", GOOD)
def test_every_setting_has_a_flag(name: str) -> None:
    value = GOOD[name][2]
    args = parser().parse_args([flag_name(name), str(value)])
    assert given_flags(args) == {name: value}
    assert typed_flags([flag_name(name) + "=x"]) == {name}
    assert typed_flags([flag_name(name).replace("-", "_").replace("__", "--", 1)]) == {name}


def test_a_shortened_flag_is_typed_too() -> None:
    """argparse takes a beginning that fits one option alone."""
    assert given_flags(parser().parse_args(["--spark-por", "31780"])) == {"port": 31780}
    assert typed_flags(["--spark-por", "31780"]) == {"port"}
    assert typed_flags(["--spark_heart=3"]) == {"heartbeat_timeout"}
    assert typed_flags(["--spark", "--spark-", "--spark-l", "--port"]) == set()


def test_the_largest_frame_fits_its_header() -> None:
    from vllm_spark.executor.channel.framing import _HEADER, MIB

    _HEADER.pack(1, SparkConfig.resolve(flags={"max_frame_mib": 4095}, environment={}).max_frame_mib * MIB)
    with pytest.raises(ConfigurationError, match="--spark-max-frame-mib 4096"):
        SparkConfig.resolve(flags={"max_frame_mib": 4096}, environment={})


def test_what_is_not_given_leaves_no_trace() -> None:
    assert given_flags(parser().parse_args([])) == {}


def test_a_bad_flag_ends_like_any_other_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["--spark-port", "70000"])
    assert caught.value.code == 2
    assert "--spark-port: port 70000 is invalid: must be a whole number from 1 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False), ("no", False)]
)
def test_spark_enable(value: str, expected: bool) -> None:
    assert enabled_by_environment({"VLLMSPARK_ENABLE": value}) is expected
    assert enabled_by_environment({}) is False


def test_spark_enable_that_is_neither() -> None:
    with pytest.raises(ConfigurationError, match="VLLMSPARK_ENABLE=maybe is neither"):
        enabled_by_environment({"VLLMSPARK_ENABLE": "maybe"})


@given(st.ip_addresses(), st.integers(1, 65535))
def test_endpoints_split_as_they_are_written(address: Any, port: int) -> None:
    host = str(address)
    assert split_endpoint(host) == (host, None)
    written = f"[{host}]:{port}" if address.version == 6 else f"{host}:{port}"
    assert split_endpoint(written) == (host, port)


def test_the_reference_in_the_documents_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), (
        "run: vllm-spark config > docs/configuration.md"
    )


def test_folders_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag may be repeated; `~` is this user's home, and a name may have an equals sign."""
    monkeypatch.setenv("HOME", "/home/bob")
    parser = argparse.ArgumentParser()
    add_flags(parser, ["follower"], prefix="--")
    given = parser.parse_args(["--model-path", "org/model=~/m", "--model-path", "/alice/a=b=/disk/ab"])
    assert SparkConfig.resolve(flags=given_flags(given), environment={}).mapped_folders == {
        "org/model": Path("/home/bob/m"),
        "/alice/a=b": Path("/disk/ab"),
    }
    assert SparkConfig().mapped_folders == {}
