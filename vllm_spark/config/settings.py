"""The settings of vllm_spark: `SparkConfig` describes and checks each of them, once.

Command line flags (`add_flags`, `given_flags`, `typed_flags`), environment variables (`enabled_by_environment`,
`environment_warnings`; names in `vllm_spark.variables`) and the reference in docs/configuration.md are derived from it;
`SparkConfig.resolve` merges their values.

A setting's value comes from, strongest first: a flag, the environment, a file (vLLM's `--config` YAML or
`additional_config["spark"]`), the default.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import ipaddress
import logging
import os
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_spark.errors import ConfigurationError, lower_first
from vllm_spark.rail_choice import RailChoice
from vllm_spark.variables import find_variable, variable_name, variable_warnings

logger = logging.getLogger("vllm_spark")

FLAG = "--spark"
SECTION = "spark"
"""The key of `additional_config` in vLLM's engine arguments that requests a pair."""
ENABLE_VARIABLE = variable_name("enable")
SECRET_VARIABLE = variable_name("secret")
"""Holds the secret itself. It is not a setting: it is never sent, stored or shown."""
DEFAULT_PORT = 29650
DEFAULT_RESERVE_GIB = 8.0
"""GiB of unified memory that are left to the desktop: enough for a browser and a video."""
MINIMUM_SECRET_BYTES = 16
_MIN_TIMEOUT = 0.001  # seconds; the smallest time-out of the runtime (tests/unit/test_session.py compares both)

Side = Literal["both", "leader", "follower"]


def _setting(
    default: Any,
    description: str,
    *,
    side: Side = "both",
    metavar: str = "",
    **constraints: Any,
) -> Any:
    """A field of `SparkConfig`.

    Args:
        side: the machine on which it is set.
        metavar: the placeholder of its value in a help text; not for settings with choices.
    """
    extra: Any = {"side": side, "metavar": metavar}
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


class SparkConfig(BaseModel):
    """The settings of vllm_spark. The leader's are sent to the follower, which sets only its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False)

    address: str | None = _setting(
        None,
        "IP address of this machine on the link to the other one; the leader listens only there. "
        "Default: the address of the RDMA device's network interface, or 127.0.0.1 on a machine without one.",
        side="leader",
        metavar="ADDRESS",
    )
    leader: str | None = _setting(
        None,
        "IP address at which the leader listens, optionally with :PORT. "
        "Default: 127.0.0.1 on a machine without RDMA device; with one, it must be given.",
        side="follower",
        metavar="ADDRESS[:PORT]",
    )
    port: int = _setting(
        DEFAULT_PORT, "TCP port at which the leader waits for its follower.", ge=1, le=65535, metavar="PORT"
    )
    secret_file: Path | None = _setting(
        None,
        "File with the secret that both machines share (at least 16 bytes; this user's or root's, and readable by its "
        "owner only, unless it is on a read-only mount, as containers have their secrets). "
        f"The variable {SECRET_VARIABLE} may hold the secret itself instead, not as well. "
        "Needed except on a loopback address. "
        "Default: `vllm-spark/secret` in the folder of this user's configuration, if it is there; "
        "`vllm-spark doctor --make-secret` makes it.",
        metavar="FILE",
    )
    join_timeout: float = _setting(
        600.0,
        "Seconds that the leader waits for its follower before it exits.",
        side="leader",
        gt=0,
        le=86400,
        metavar="SECONDS",
    )
    model_sync: Literal["auto", "off"] = _setting(
        "auto",
        "`auto`: the machine that has a model, a draft model or an adapter sends it over the link to the one that does "
        "not. `off`: both must have it.",
        side="leader",
    )
    model_path: str | None = _setting(
        None,
        "Folders of this machine for models that the leader calls NAME (a name of a hub, or the leader's path), "
        "separated by commas. They are looked for there first, and copied there. The flag may be repeated.",
        side="follower",
        metavar="NAME=FOLDER,...",
    )
    reserve_memory: float | None = _setting(
        None,
        "GiB of this machine's memory that are left to its desktop and other programs: a start that would leave less "
        "is refused, and an engine is stopped once less than an eighth of it is available. "
        f"Default: {DEFAULT_RESERVE_GIB:g} where GPU and processor share their memory, as on a GB10, else 0.",
        ge=0,
        le=1024,
        metavar="GIB",
    )
    heartbeat_timeout: float = _setting(
        5.0,
        "Seconds without a heartbeat after which the peer counts as lost.",
        side="leader",
        ge=0.5,
        le=3600,
        metavar="SECONDS",
    )
    collective_timeout: float = _setting(
        600.0,
        "Seconds that one rank waits for the other inside a collective before both stop. A first start may "
        "compile longer on one rank than on the other, so the default is long; the heartbeat detects a lost peer.",
        side="leader",
        ge=_MIN_TIMEOUT,
        le=86400,
        metavar="SECONDS",
    )
    max_frame_mib: int = _setting(
        256,
        "Largest message accepted on the channel between the machines, in MiB.",
        ge=1,
        le=4095,
        metavar="MIB",
    )
    transport: Literal["auto", "verbs", "loopback"] = _setting(
        "auto",
        "How ranks exchange data: `loopback` is shared memory between two processes of one machine, `verbs` is "
        "RDMA over RoCE, `auto` is loopback on one machine and verbs between two.",
        side="leader",
    )
    rails: str | None = _setting(
        None,
        "Verbs: RDMA ports of this machine to use, separated by commas, each DEVICE, DEVICE:PORT or "
        "DEVICE:PORT:GID_INDEX. Default: every active one that is in one network with one of the other machine.",
        metavar="DEVICE,...",
    )
    link_timeout: float = _setting(
        30.0,
        "Verbs: seconds without any working rail after which both machines stop. Until then they wait for one.",
        side="leader",
        ge=_MIN_TIMEOUT,
        le=3600,
        metavar="SECONDS",
    )
    rail_timeout: float = _setting(
        0.5,
        "Verbs: seconds for which a NIC retransmits what is not acknowledged, before its rail fails and the others "
        "carry on. NICs use the next lower of 0.47 s times a power of two, and may take up to four times as long.",
        side="leader",
        ge=_MIN_TIMEOUT,
        le=8,
        metavar="SECONDS",
    )
    traffic_class: int = _setting(0, "Verbs: traffic class of the packets.", side="leader", ge=0, le=255, metavar="N")
    service_level: int = _setting(0, "Verbs: service level of the packets.", side="leader", ge=0, le=15, metavar="N")
    loopback_mode: Literal["direct", "proxied"] = _setting(
        "direct",
        "Loopback only: `direct` stores into the peer's memory, `proxied` uses the proxy thread that also posts "
        "RDMA writes.",
        side="leader",
    )
    loopback_latency_us: float = _setting(
        0.0,
        "Loopback, proxied: latency of the modelled wire, of one rail and the same for every size, in microseconds.",
        side="leader",
        ge=0,
        le=1e6,
        metavar="MICROSECONDS",
    )
    loopback_gbytes_per_s: float = _setting(
        0.0,
        "Loopback, proxied: bandwidth of the modelled wire, in GB/s; 0 means unlimited.",
        side="leader",
        ge=0,
        le=1e4,
        metavar="GB/S",
    )
    wire: Path | None = _setting(
        None,
        "Loopback, proxied: file with a wire model (rails, each with latencies over the size of a write and a "
        "bandwidth), written by `vllm-spark bench wire`. It replaces the two settings above.",
        side="leader",
        metavar="FILE",
    )
    slot_kib: int = _setting(
        1024,
        "Size of one slot for large messages, in KiB; larger messages are sent in chunks.",
        side="leader",
        ge=4,
        le=65536,
        metavar="KIB",
    )
    packet_kib: int | None = _setting(
        None,
        "Messages up to this size, in KiB, use the LL protocol (a flag in every packet); larger ones the Simple "
        "protocol (payload, then flag). Default: the launch table's, else 8 between CPUs, 128 between GPUs of one "
        "machine without a proxy, and 16 between other GPUs.",
        side="leader",
        ge=0,
        le=1024,
        metavar="KIB",
    )
    launch_table: Path | None = _setting(
        None,
        "File with the launch shapes of collectives on this GPU, written by `vllm-spark bench calibrate`. "
        "Default: `vllm-spark/launch.json` in the folder of this user's configuration, if it is there.",
        side="leader",
        metavar="FILE",
    )
    depth: int = _setting(
        4,
        "Window: chunks of a large message that may be in flight at once.",
        side="leader",
        ge=1,
        le=64,
        metavar="N",
    )

    trace: Literal["off", "on"] = _setting(
        "off",
        "`on`: clients that may use the API may also record steps of both machines with `vllm-spark trace`. A trace "
        "has names of kernels, sizes and times, and nothing of prompts and answers.",
        side="leader",
    )

    @field_validator("address", "leader")
    @classmethod
    def _is_ip(cls, value: str | None, info: Any) -> str | None:
        if value is None:
            return None
        host, port = split_endpoint(value)
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            if not value.strip():
                raise ValueError("it is empty; give a numeric address, such as 10.0.0.1, or leave it out") from None
            raise ValueError(f"{host!r} is not an IP address; give a numeric address, such as 10.0.0.1") from None
        if kind := kind_of_many(address):
            raise ValueError(
                f"{host!r} is {kind}, not the address of one machine; give the leader's address on the link, such as "
                "10.0.0.1"
            )
        if port is not None and info.field_name == "address":
            raise ValueError(f"{value!r} has a port; give the port with {flag_name('port')}")
        return value

    @field_validator("port", mode="before")
    @classmethod
    def _is_not_a_service(cls, value: Any) -> Any:
        if isinstance(value, str) and "://" in value:
            raise ValueError(
                f"it is not a port but the address of a Service; Kubernetes sets {variable_name('port')} for a Service "
                'named "vllmspark": rename the Service, or set `enableServiceLinks: false` for the pod'
            )
        return value

    @field_validator("rails")
    @classmethod
    def _are_rails(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.strip():
            raise ValueError("it is empty; give DEVICE, DEVICE:PORT or DEVICE:PORT:GID_INDEX, or leave it out")
        ports = set()
        for rail in value.split(","):
            choice = RailChoice.parse(rail.strip())
            port = (choice.device, choice.port or 1)
            if port in ports:
                raise ValueError(f"it has port {port[1]} of {port[0]} twice; give each port once")
            ports.add(port)
        return value

    @field_validator("model_path")
    @classmethod
    def _maps_names(cls, value: str | None) -> str | None:
        if value is not None:
            _mapped_folders(value)
        return value

    @field_validator("depth")
    @classmethod
    def _is_power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("it is not a power of two; use 1, 2, 4, 8, 16, 32 or 64")
        return value

    @field_validator("secret_file", "launch_table", "wire", mode="before")
    @classmethod
    def _is_named(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("it is empty; name a file, or leave it out")
        return value

    @field_validator("secret_file", "launch_table", "wire")
    @classmethod
    def _expand(cls, value: Path | None) -> Path | None:
        if value is not None and "\0" in str(value):
            raise ValueError("a file name must not contain a NUL character; give another")
        return None if value is None else _expand_home(value)

    @model_validator(mode="after")
    def _check_combinations(self) -> SparkConfig:
        if self.transport == "verbs" and self.loopback_mode == "proxied":
            raise ValueError(
                f"{FLAG}-transport verbs and {FLAG}-loopback-mode proxied contradict each other; leave one out"
            )
        numbers = [name for name in ("loopback_latency_us", "loopback_gbytes_per_s") if getattr(self, name)]
        if self.wire is not None and numbers:
            raise ValueError(f"{FLAG}-wire and {flag_name(numbers[0])} contradict each other; leave one out")
        if self.loopback_mode == "direct" and (numbers or self.wire is not None):
            absent = self.wire is not None and not os.path.exists(self.wire)
            raise ValueError(
                f"a modelled wire needs the proxy; add {FLAG}-loopback-mode proxied, or leave out {FLAG}-wire, "
                f"{FLAG}-loopback-latency-us and {FLAG}-loopback-gbytes-per-s"
                + (
                    f" (and {FLAG}-wire {self.wire} does not exist; give a file that vllm-spark bench wire wrote)"
                    if absent
                    else ""
                )
            )
        if self.packet_kib is not None and self.packet_kib > self.slot_kib:
            raise ValueError(
                f"{FLAG}-packet-kib {self.packet_kib} is more than {FLAG}-slot-kib {self.slot_kib}; "
                "a message of the LL protocol must fit into a slot"
            )
        return self

    def reserved_bytes(self, *, unified: bool) -> int:
        """`reserve_memory` in bytes, or its default.

        Args:
            unified: whether GPU and processor share this machine's memory.
        """
        default = DEFAULT_RESERVE_GIB if unified else 0.0
        return int((default if self.reserve_memory is None else self.reserve_memory) * (1 << 30))

    @property
    def mapped_folders(self) -> dict[str, Path]:
        """The folders of `model_path`, absolute, by the leader's names."""
        return _mapped_folders(self.model_path) if self.model_path is not None else {}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        # vLLM logs its arguments: only what is not the default.
        fields = type(self).model_fields
        return [(name, value) for name, value in super().__repr_args__() if not name or value != fields[name].default]

    @classmethod
    def resolve(
        cls,
        *,
        flags: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        file: Mapping[str, Any] | None = None,
    ) -> SparkConfig:
        """Merges the three sources, strongest first: `flags`, `environment` (`VLLMSPARK_*`), `file`.

        Raises:
            ConfigurationError: an unknown name, an invalid value (the sentence names both), two different ports of
                the leader, or a variable whose old name has another value.
        """
        flags, file = dict(flags or {}), dict(file or {})
        environment = os.environ if environment is None else environment
        for name in file:
            if name not in cls.model_fields:
                raise ConfigurationError(
                    f"{SECTION!r} in vLLM's additional_config has {name!r}, and there is no such setting"
                    f"{_suggestion(name, cls.model_fields)}"
                )
        values: dict[str, Any] = dict(file)
        origin = dict.fromkeys(file, "")
        for name in cls.model_fields:
            if variable := find_variable(variable_name(name), environment):
                values[name], origin[name] = variable.value, variable.name
        for name, value in flags.items():
            values[name], origin[name] = value, flag_name(name)
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigurationError(_error_sentence(error, origin)) from None
        sources = {name: 2 if name in flags else 1 if origin[name] else 0 for name in values}  # by precedence
        if config.leader is not None and "port" in values and sources["leader"] <= sources["port"]:
            at = split_endpoint(config.leader)[1]
            if at is not None and at != config.port:
                raise ConfigurationError(
                    f"{origin['leader'] or 'leader'} {config.leader} and {origin['port'] or 'port'} {config.port} are "
                    "different ports of the leader; leave one of them out"
                )
        return config


def _mapped_folders(value: str) -> dict[str, Path]:
    """The folders of a value of `model_path`, by name. Raises ValueError."""
    folders: dict[str, Path] = {}
    for part in value.split(","):
        name, equals, folder = part.strip().rpartition("=")
        if not (name and equals and folder) or "\0" in part:
            raise ValueError(f"{part.strip()!r} is not NAME=FOLDER; give a leader's model and a folder of this machine")
        path = Path(os.path.abspath(_expand_home(folder)))
        if folders.setdefault(name, path) != path:
            raise ValueError(f"it has {name!r} twice; give each name once")
    return folders


def kind_of_many(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    """What `address` is, if no single machine has it; else None. Broadcast addresses of networks are not detected."""
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_unspecified:
        return "the wildcard address"
    if address.is_multicast:
        return "a multicast address"
    return "the broadcast address" if str(address) == "255.255.255.255" else None


def split_endpoint(value: str) -> tuple[str, int | None]:
    """Splits `HOST`, `HOST:PORT`, `[V6]:PORT` or a bare IPv6 address into host and port (None if absent)."""
    host, port = value, ""
    if value.startswith("["):
        host, _, port = value[1:].partition("]")
        port = port.removeprefix(":")
    elif value.count(":") == 1:
        host, _, port = value.partition(":")
    if not port:
        return host, None
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{port!r} is not a port; ports go from 1 to 65535")
    return host, int(port)


_prefix = FLAG + "-"  # of the flags in messages; the same in all threads of a process


@contextlib.contextmanager
def flags_named(prefix: str) -> Iterator[None]:
    """Messages that are made in the body name flags with `prefix`: that of the command that the user typed."""
    global _prefix
    before, _prefix = _prefix, prefix
    try:
        yield
    finally:
        _prefix = before


def flag_name(field: str) -> str:
    """The flag of a setting in a message: `--spark-heartbeat-timeout`, or `--port` within `flags_named("--")`."""
    return _prefix + field.replace("_", "-")


def serve_flag(field: str) -> str:
    """The flag of a setting of `vllm serve`: `heartbeat_timeout` -> `--spark-heartbeat-timeout`."""
    return f"{FLAG}-{field.replace('_', '-')}"


def enabled_by_environment(environment: Mapping[str, str] | None = None) -> bool:
    """True if VLLMSPARK_ENABLE requests vllm_spark, as the flag `--spark` does.

    Raises:
        ConfigurationError: VLLMSPARK_ENABLE is neither yes nor no, or its old name has another value.
    """
    variable = find_variable(ENABLE_VARIABLE, environment)
    value = variable.value.strip().lower() if variable else ""
    if value in ("1", "true", "yes", "on"):
        return True
    if variable is None or value in ("", "0", "false", "no", "off"):
        return False
    raise ConfigurationError(f"{variable.name}={value} is neither 1 nor 0; set it to 1, or unset it")


def environment_warnings(environment: Mapping[str, str] | None = None) -> list[str]:
    """Whole sentences about variables of this project that have their old names, or look misspelt."""
    fields = [variable_name(name) for name in SparkConfig.model_fields]
    return variable_warnings([*fields, ENABLE_VARIABLE, SECRET_VARIABLE], environment)


def log_environment_warnings() -> None:
    """Logs `environment_warnings`."""
    for sentence in environment_warnings():
        logger.warning("%s", sentence)


def add_flags(group: Any, sides: Iterable[Side], prefix: str = FLAG + "-", names: Iterable[str] | None = None) -> None:
    """Adds an option for each setting of the given sides, or of `names` among them, to an argparse parser or group.

    Options that are not given are absent from the result. An invalid value ends in argparse's one-line error and exit
    code 2. With another `prefix`, the names with the usual prefix, which messages use, work too.
    """
    wanted = set(sides)
    chosen = set(names or SparkConfig.model_fields)
    for name, field in SparkConfig.model_fields.items():
        if side_of(name) not in wanted or name not in chosen:
            continue
        default = "" if field.default is None else f" (default: {field.default})"
        choices = _choices(field.annotation)
        group.add_argument(
            *dict.fromkeys((prefix + name.replace("_", "-"), serve_flag(name))),
            dest="spark_" + name,
            action=_Joined if name == "model_path" else "store",
            type=setting_type(name),
            default=argparse.SUPPRESS,
            metavar=_extra(field, "metavar") if choices is None else "{" + ",".join(choices) + "}",
            help=(field.description or "").replace("%", "%%") + default,
        )


class _Joined(argparse.Action):
    """Puts the values of a repeated option together, with commas."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a parsed command line, by field name."""
    values = {name: getattr(args, "spark_" + name, None) for name in SparkConfig.model_fields}
    return {name: value for name, value in values.items() if value is not None}


def typed_flags(argv: Sequence[str]) -> set[str]:
    """Names of the settings whose flags are in `argv`, in full or abbreviated, and not only in a `--config` file."""
    names: set[str] = set()
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith(FLAG + "-"):
            # argparse accepts an unambiguous abbreviation.
            meant = [name for name in SparkConfig.model_fields if serve_flag(name).startswith(flag)]
            names.update(name for name in meant if len(meant) == 1 or flag == serve_flag(name))
    return names


def side_of(name: str) -> Side:
    """The machine on which a setting is set."""
    side: Side = _extra(SparkConfig.model_fields[name], "side")
    return side


def setting_type(name: str) -> Any:
    """An argparse `type` that checks one setting as `SparkConfig` does."""

    def convert(text: str) -> Any:
        try:
            return getattr(SparkConfig.model_validate({**_context_for(name), name: text}), name)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(_error_sentence(error, {name: ""})) from None

    convert.__name__ = name
    return convert


def _extra(field: Any, key: str) -> Any:
    return typing.cast("dict[str, Any]", field.json_schema_extra)[key]


def _choices(annotation: Any) -> tuple[str, ...] | None:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else None


def _context_for(name: str) -> dict[str, Any]:
    """Values of other settings with which `name` is valid alone: combinations are checked later."""
    if name in ("loopback_latency_us", "loopback_gbytes_per_s", "wire"):
        return {"loopback_mode": "proxied"}
    if name == "packet_kib":
        return {"slot_kib": 65536}
    if name == "slot_kib":
        return {"packet_kib": 0}
    return {}


def _expand_home(path: Path | str) -> Path:
    """`path` with `~` expanded; the `~` of an unknown user stays, and reading the file reports it."""
    return Path(os.path.expanduser(path))


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; the most similar one is {near[0]!r}" if near else "; `vllm-spark config` lists all settings"


_RANGE_ERRORS = (
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"),
    *("int_parsing", "int_parsing_size", "int_from_float", "int_type", "float_parsing", "float_type"),
)
"""Types of pydantic's errors about a number; its messages name one end of the range alone."""


def _range(name: str) -> str:
    """The values of a setting that is a number: "a whole number from 1 to 65535"."""
    field = SparkConfig.model_fields[name]
    limits = {key: getattr(part, key) for part in field.metadata for key in ("ge", "gt", "le") if hasattr(part, key)}
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    kind = "a whole number" if int in kinds else "a number"
    lowest = f"from {limits['ge']:g} to" if "ge" in limits else f"above {limits['gt']:g} and at most"
    return f"{kind} {lowest} {_plain_number(limits['le'])}"


def _plain_number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:g}"


def _error_sentence(error: ValidationError, origin: Mapping[str, str]) -> str:
    """The first problem as one sentence: its source, the value, and what is wrong."""
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    message = lower_first(message)
    if not first["loc"]:
        return message
    name = str(first["loc"][0])
    if first["type"] in _RANGE_ERRORS and name in SparkConfig.model_fields:
        return f"{origin.get(name) or name} {first['input']} is invalid: must be {_range(name)}"
    where = origin.get(name, "")
    value = first["input"] if str(first["input"]).strip() else repr(first["input"])
    where = f"{where} {value}: " if where else (f"{name} {value}: " if name in origin else "")
    return f"{where}{message}"
