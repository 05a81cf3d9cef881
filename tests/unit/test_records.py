"""Records as JSON: what fits is read as it was written, and anything else is one part of a sentence."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spark.collective.launch_table import LaunchTable
from vllm_spark.collective.rails import Port, PortAddress
from vllm_spark.collective.rendezvous import Address, LinkOffer, Ports, Ready, Terms
from vllm_spark.doctor.checks import MachineReport
from vllm_spark.executor.environment import Environment
from vllm_spark.executor.group_connection import Head, decode_piece
from vllm_spark.executor.handshake.messages import Hello, Offer, Progress, Reason, Welcome
from vllm_spark.executor.handshake.versions import Versions
from vllm_spark.executor.heartbeat import FollowerReport, LeaderReport
from vllm_spark.executor.model_files.comparison import ModelIdentity
from vllm_spark.executor.model_files.hub_cache import HubPlace
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.store import Answer, Request
from vllm_spark.records import RecordError, from_json, indented_json, to_json

VERSIONS = Versions("4", "0.1.0", "0.32.0", "2.9", "3.11")
IDENTITY = ModelIdentity({"config.json": "1"}, {})
FILES = LoadedFiles(
    "model", "a/b", "/models/b", "model", ModelIdentity({"config.json": "1"}, {}), "hub", HubPlace("a/b", "c")
)
EXAMPLES: list[Any] = [
    Hello("control", "s" * 32, "desk1", 7, VERSIONS),
    Welcome("desk1", 7),
    Reason("it failed", "Traceback\n", final=True),
    Offer("a/b", [FILES], 5.0, Environment({"VLLM_X": "\xff"}, {})),
    Progress("reading"),
    LeaderReport(3, "00ff"),
    Terms(0, 2, "desk1", {"depth": "4"}),
    Address("boot", 7, 3, ("1", "2")),
    Ports((Port("mlx5_0", 1, 4096, (PortAddress(bytes(range(16)), "10.0.0.0/24"),)),)),
    LinkOffer(b"\x00\xff\xfe"),
    Ready("no"),
    Head("0", "collectives", 1, "barrier", 0),
    Request("set", ["key"], [b"\xff", b""]),
    Answer([b"\x00"]),
]
KINDS = [type(each) for each in EXAMPLES] + [FollowerReport, MachineReport, LaunchTable]


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part of a record."""

    number: int
    share: float = 0.5


@dataclasses.dataclass(frozen=True)
class Outer:
    """A record with another in it."""

    name: str
    kind: Literal["a", "b"]
    inner: Inner
    by_batch: dict[int, list[float]] = dataclasses.field(default_factory=dict)


@pytest.mark.parametrize("record", EXAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_is_read_as_it_was_written(record: Any) -> None:
    assert from_json(to_json(record), type(record)) == record


def test_the_connection_of_a_hello_has_the_name_that_every_version_reads() -> None:
    assert json.loads(to_json(EXAMPLES[0]))["lane"] == "control"


def test_unknown_fields_are_ignored_and_missing_ones_have_their_defaults() -> None:
    assert from_json('{"name":"x","kind":"a","inner":{"number":1},"new":[]}', Outer) == Outer("x", "a", Inner(1))


@pytest.mark.parametrize(
    ("payload", "fault"),
    [
        (b"", "invalid JSON: EOF while parsing a value at line 1 column 0"),
        (b"\xff\xfe", "invalid JSON: expected value at line 1 column 1"),
        (b"null", "input should be an object"),
        (b"[" * 100_000, "invalid JSON: recursion limit exceeded"),
        (b'{"kind":"a","inner":{"number":1}}', "name: field required"),
        (b'{"name":1,"kind":"a","inner":{"number":1}}', "name: input should be a valid string"),
        (b'{"name":"x","kind":"c","inner":{"number":1}}', "kind: input should be 'a' or 'b'"),
        (b'{"name":"x","kind":"a","inner":{"number":"1"}}', "inner.number: input should be a valid integer"),
        (
            b'{"name":"x","kind":"a","inner":{"number":1},"by_batch":{"x":[1]}}',
            "by_batch.x: input should be",
        ),
        (b'{"name":"\\ud800","kind":"a","inner":{"number":1}}', "invalid JSON: "),
    ],
)
def test_a_fault_is_a_part_of_a_sentence(payload: bytes, fault: str) -> None:
    with pytest.raises(RecordError) as caught:
        from_json(payload, Outer)
    assert str(caught.value).startswith(fault)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "fault"),
    [("two\nlines", r"'two\nlines': unknown field"), ("k" * 1000, "k" * 60 + "...: unknown field")],
    ids=["a line's end", "a long one"],
)
def test_a_name_in_a_fault_is_short_and_on_one_line(key: str, fault: str) -> None:
    with pytest.raises(RecordError) as caught:
        from_json(json.dumps({key: 1}), LaunchTable)
    assert str(caught.value) == fault


def test_bytes_are_base64() -> None:
    assert json.loads(to_json(LinkOffer(b"\xff\xff"))) == {"offer": "//8=", "problem": ""}
    with pytest.raises(RecordError, match=r"^offer: must be base64 \("):
        from_json(b'{"offer":"!"}', LinkOffer)
    with pytest.raises(RecordError, match=r"^offer: "):
        from_json('{"offer":"\u00e4"}', LinkOffer)


def fault_of(read: Callable[..., Any], *arguments: Any) -> str:
    """The text of the error; empty without one."""
    try:
        read(*arguments)
    except RecordError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(
    payload=st.binary(max_size=64)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_payload_raises_another_error(kind: type, payload: bytes) -> None:
    assert "\n" not in fault_of(from_json, payload, kind)


@given(payload=st.binary(max_size=64))
def test_no_piece_raises_another_error(payload: bytes) -> None:
    assert "\n" not in fault_of(decode_piece, payload)


def test_indented_json_is_for_files() -> None:
    content = {"rows": [Inner(1)], "limit": float("nan"), "times": {2: (1.0,)}}
    assert json.loads(indented_json(content)) == {
        "rows": [{"number": 1, "share": 0.5}],
        "limit": None,
        "times": {"2": [1.0]},
    }


def test_threads_may_read_a_type_for_the_first_time_at_once() -> None:
    """As the HELLO messages of a follower's connections are: each with a type that was not used before."""
    payload = to_json(Outer("x", "a", Inner(1)))
    found: list[Any] = []
    previous = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for round_ in range(20):
            inner = dataclasses.make_dataclass("FreshInner", [("number", int)])
            fresh = dataclasses.make_dataclass("Fresh", [("name", str), ("inner", inner)])
            ready = threading.Barrier(4)

            def read(kind: Any = fresh, ready: threading.Barrier = ready) -> None:
                ready.wait(20)
                found.append(from_json(payload, kind))

            threads = [threading.Thread(target=read) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(20)
            assert len(found) == 4 * (round_ + 1)
    finally:
        sys.setswitchinterval(previous)
