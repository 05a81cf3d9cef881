"""No native call keeps the interpreter's lock while it waits: other threads send heartbeats and heal links meanwhile.

Nor does one give it up that takes microseconds: whoever takes it in between may keep it for milliseconds.

What a GPU's driver does when it blocks is shown with a libcuda without a GPU (cuda_in_memory.cpp), whose calls are held
until another thread of Python releases them. A call that keeps the lock keeps that thread from running, so it ends by
itself after a while, and that is counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from .programs import Programs

BOUND = 300

COMMON = """
import ctypes, json, sys, threading, time
from vllm_spark import _native

BOUND = 60.0
SHARED = dict(slot_bytes=1 << 16, packet_bytes=1 << 12, depth=2, stripes=1,
    first_sequence=1, largest_message=1 << 26)

def count_other_threads(*calls):
    "Prints how often another thread, which always wants to, ran while this one made each of `calls` again and again."
    sys.setswitchinterval(2 * BOUND)  # only a call that releases the interpreter's lock lets it run
    turns, ended = 0, False

    def run():
        nonlocal turns
        while not ended:
            turns += 1
            time.sleep(0)

    other = threading.Thread(target=run)
    other.start()
    wait_until(lambda: turns > 0)
    before = turns
    for _ in range(2000):
        for call in calls:
            call()
    seen = turns - before
    ended = True
    other.join(BOUND)
    print(json.dumps({"turns": seen}))

def wait_until(condition):
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
"""

DRIVER = (
    COMMON
    + """
cuda = ctypes.CDLL("libcuda.so.1")
SHAPE = _native.LaunchShape(packet_threads=288, payload_threads=256, payload_blocks=32, payload_bytes_per_block=4096,
    payload_message_bytes=1 << 17, dependent_launch=True)

def make(rank):
    return _native.DeviceRuntime(_native.Options(rank=rank, proxied=False, timeout_s=30.0, **SHARED), SHAPE, b"image")

def pair():
    ranks = make(0), make(1)
    for rank, peer in (ranks, ranks[::-1]):
        rank.connect(*peer.address(), "the other")
    return ranks

# No thread is made to give the interpreter's lock up: it does so where it ends, waits, or a native call releases it.
sys.setswitchinterval(2 * BOUND)

outcome, calling = [], []
def attempt(work):
    calling.append(work)  # from here on no other thread runs before the call releases the lock, or the thread ends
    try:
        work()
        outcome.append(None)
    except Exception as error:
        outcome.append(str(error))

def all_reduce(rank):
    rank.all_reduce(1 << 20, 1 << 20, 64, _native.DType.FLOAT32, 0)

def blocked(call, *works):
    "Each work on a thread of its own, while the driver blocks in `call`. This thread goes on, and ends that."
    cuda.cuda_hold(call)
    threads = [threading.Thread(target=attempt, args=(work,)) for work in works]
    for index, thread in enumerate(threads):
        thread.start()
        if index == 0:
            wait_until(lambda: cuda.cuda_waiting() or cuda.cuda_expired())
        wait_until(lambda: len(calling) == index + 1)
    cuda.cuda_release()
    for thread in threads:
        thread.join(BOUND)
    print(json.dumps({"expired": cuda.cuda_expired(), "outcome": outcome, "hung": any(t.is_alive() for t in threads)}))

kind = sys.argv[1]
if kind == "constructor":
    blocked(b"load", lambda: make(0))
elif kind == "connect":
    one, other = make(0), make(1)
    blocked(b"register", lambda: one.connect(*other.address(), "the other"))
elif kind == "all_reduce":
    ranks = pair()
    blocked(b"launch", lambda: all_reduce(ranks[0]))
elif kind == "all_gather":
    ranks = pair()
    blocked(b"launch", lambda: ranks[0].all_gather(1 << 20, 1 << 21, 1, 64, 0))
elif kind == "close":
    ranks = pair()
    blocked(b"synchronize", ranks[0].close)
elif kind == "garbage":
    held = list(pair())
    blocked(b"synchronize", lambda: held.pop())
elif kind == "several":
    # The first holds the runtime's lock while the driver blocks, and the next two wait for that lock.
    ranks = pair()
    blocked(b"launch", lambda: all_reduce(ranks[0]), lambda: all_reduce(ranks[0]), ranks[0].close, ranks[0].check)
elif kind == "check":
    ranks = pair()
    count_other_threads(ranks[0].check)
"""
)

LINK = (
    COMMON
    + """
kind = sys.argv[1]

def make(rank):
    return _native.Runtime(_native.Options(rank=rank, proxied=True, timeout_s=0.2, **SHARED))

ports = _native.rdma_ports()
ranks = [make(0), make(1)]
rails = [(ports[0][0], 1, ports[0][5][0][1], 4096)]
path = {"rails": rails, "rail_timeout_s": 0.5, "traffic_class": 0, "service_level": 0}
offers = [rank.open_link(**path, timeout_s=60.0) for rank in ranks]
for rank, offer in zip(ranks, offers[::-1]):
    rank.connect_link(offer, "the other")
for rank in ranks:
    rank.start()
if kind == "short":
    link = ranks[0]
    count_other_threads(lambda: link.deliver(offers[1]), link.take_announcement, link.take_log, link.silence)
    for rank in ranks:
        rank.close()
    sys.exit()
memory = bytearray(64)
address = ctypes.addressof((ctypes.c_char * 64).from_buffer(memory))
try:
    ranks[0].all_reduce(address, address, 16, _native.DType.FLOAT32)
except _native.CollectiveTimeoutError:
    pass
ended, ticks = threading.Event(), 0

def drop():
    ranks.pop(0)  # waits for what was posted, which goes over no rail, for seconds
    ended.set()

threading.Thread(target=drop).start()
while not ended.wait(0.01):
    ticks += 1
print(json.dumps({"ticks": ticks}))
"""
)


def run(program: str, *arguments: str, libraries: str, **variables: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": libraries, **variables},
        capture_output=True,
        text=True,
        timeout=BOUND,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("kind", ["constructor", "connect", "all_reduce", "all_gather", "close", "garbage"])
def test_a_driver_that_blocks_stops_no_other_thread(kind: str, programs: Programs) -> None:
    report = run(DRIVER, kind, libraries=str(programs.libcuda()))
    assert report["expired"] == 0, "no other thread of Python ran while the driver blocked"
    assert report == {"expired": 0, "outcome": [None], "hung": False}


def test_threads_that_wait_for_a_blocked_launch_do_not_lock_each_other_out(programs: Programs) -> None:
    report = run(DRIVER, "several", libraries=str(programs.libcuda()))
    assert (report["expired"], report["hung"]) == (0, False)
    assert len(report["outcome"]) == 4
    for reason in filter(None, report["outcome"]):  # those that came after the end
        assert "closed" in reason


def test_a_runtime_that_is_dropped_while_its_link_is_down_stops_no_other_thread(programs: Programs) -> None:
    library = programs.libibverbs("verbs_unreliable.cpp")
    report = run(LINK, "drop", libraries=str(library), FAULTY_DEVICE="both", LOSE_OVER="-1")
    assert report["ticks"] > 10


def test_short_calls_keep_the_interpreters_lock(programs: Programs) -> None:
    assert run(DRIVER, "check", libraries=str(programs.libcuda())) == {"turns": 0}
    assert run(LINK, "short", libraries=str(programs.libibverbs("verbs_unreliable.cpp"))) == {"turns": 0}
