"""The wire probe between two ends of one process, over a libibverbs that copies memory: what goes where, and errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from .programs import Programs

BOUND = 300

PROGRAM = """
import ctypes, json, sys, threading
from vllm_spark import _native

LARGEST, RAILS, COUNT = 1 << 20, 2, 200
attended = []

def attend():
    attended.append(1)
    if len(attended) == 3:
        raise KeyError("enough")

def make(end, timeout=60.0, rail_timeout=0.5, attend=lambda: None):
    device, port, active, ethernet, mtu, gids = _native.rdma_ports()[end]
    rails = [(device, port, gids[0][1], mtu)] * RAILS
    return _native.WireProbe(
        rails=rails, largest=LARGEST, timeout_s=timeout, rail_timeout_s=rail_timeout, traffic_class=0, service_level=0,
        attend=attend,
    )

def pair(**options):
    one, other = make(0, **options), make(1, **options)
    offers = one.offer(), other.offer()
    one.connect(offers[1], "other")
    other.connect(offers[0], "one")
    return one, other

def failure(call, *arguments):
    try:
        call(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]

def both(one, pinged, other, answered, size):
    result = []
    answer = threading.Thread(target=lambda: result.append(failure(other.answer, answered, size, COUNT)))
    answer.start()
    try:
        times = one.ping(pinged, size, COUNT)
        problem = None if len(times) == COUNT and min(times) >= 0 else ["times", str(times)]
    except Exception as error:
        problem = [type(error).__name__, str(error)]
    answer.join()
    return problem or result[0]

report = {}
one, other = pair()
sizes = [1, 2, 64, 65, 128, 129, 4096, 5000, LARGEST, 2, LARGEST]
report["pings"] = [both(one, rails, other, rails, size) for rails in ([0], [1], [0, 1]) for size in sizes]
# A message of one cache line goes over the first rail alone, a longer one over both.
report["short"] = both(one, [0, 1], other, [0], 128)
one, other = pair(timeout=0.5)
report["long"] = both(one, [0, 1], other, [0], 129)
one, other = pair()
report["streams"] = [one.stream(rails, size, 300, depth) > 0
    for rails in ([0], [1], [0, 1]) for size in (1, 4096, LARGEST) for depth in (1, 7, _native.WireProbe.MAX_DEPTH)]
# A stream leaves nothing that could be taken for a ping.
report["after"] = both(one, [0, 1], other, [0, 1], LARGEST)
report["errors"] = [
    failure(one.ping, [0], 0, 1), failure(one.ping, [0], LARGEST + 1, 1), failure(one.ping, [2], 1, 1),
    failure(one.ping, [], 1, 1), failure(one.ping, [0], 1, 0), failure(one.stream, [0], 1, 0, 1),
    failure(one.stream, [0], 1, 1, 0), failure(one.stream, [0], 1, 1, 513), failure(one.connect, b"", "other"),
]
impatient, silent = pair(timeout=0.5)
report["alone"] = failure(impatient.ping, [1], 8, 1)
attentive, silent = pair(attend=attend)
report["attended"] = failure(attentive.answer, [0], 8, 1)
timeout = ctypes.c_int.in_dll(ctypes.CDLL("libibverbs.so.1"), "transmission_timeout")
report["timeouts"] = {}
for seconds in (0.001, 0.46, 0.5, 0.93, 0.94, 4, 8, 1e6):
    pair(rail_timeout=seconds)
    report["timeouts"][str(seconds)] = timeout.value
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(programs: Programs) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "LD_LIBRARY_PATH": str(programs.libibverbs("verbs_in_memory.cpp"))},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_messages_of_any_size_arrive_over_each_rail_and_over_both(report: dict[str, Any]) -> None:
    assert set(map(str, report["pings"])) == {"None"}
    assert report["after"] is None
    assert all(report["streams"])


def test_over_several_rails_a_message_is_cut_like_a_payload(report: dict[str, Any]) -> None:
    assert report["short"] is None
    kind, sentence = report["long"]
    assert kind == "CollectiveTimeoutError"
    assert sentence.startswith("rail 1 (memory0) to other: no message of 1 bytes came within 0.5 s; ")


def test_every_wait_is_bounded_and_looks_after_the_rest(report: dict[str, Any]) -> None:
    kind, sentence = report["alone"]
    assert kind == "CollectiveTimeoutError"
    assert sentence.startswith("rail 1 (memory0) to other: no message of 8 bytes came within 0.5 s; ")
    assert report["attended"] == ["KeyError", "'enough'"], "what is raised meanwhile ends a wait"


def test_a_nic_has_transmitted_seven_times_within_the_rails_timeout(report: dict[str, Any]) -> None:
    """4.096 us times two to the power of what it is given lie between two transmissions (InfiniBand, 9.7.6.1.3)."""
    for seconds, code in report["timeouts"].items():
        assert 0 < code < 32, "0 is unlimited, and there are five bits"
        assert 7 * 4.096e-6 * 2**code <= float(seconds)
        assert code == 31 or 7 * 4.096e-6 * 2 ** (code + 1) > float(seconds)
    assert report["timeouts"]["0.5"] == 14


def test_what_is_impossible(report: dict[str, Any]) -> None:
    parts = (
        *("a message of 0 bytes", "a message of 1048577 bytes", "there is no rail 2", "no rail was named"),
        *("0 round trips", "0 messages", "a depth of 0", "a depth of 513 is not possible; it goes from 1 to 512"),
        "other sent no valid description of 2 rails",
    )
    for (kind, sentence), part in zip(report["errors"], parts, strict=True):
        assert kind in ("UsageError", "CollectiveError")
        assert sentence.startswith(part)
