"""The model of the link (csrc/transport/wire_model.cpp), without a link and without a clock."""

from __future__ import annotations

import subprocess

import pytest

from vllm_spark.collective.link_model import PUBLISHED_LATENCY, PUBLISHED_POSTING, PUBLISHED_RAIL

from .programs import CHECKED, Programs, without_preload


def test_single_writes_rates_and_order_of_random_traffic(programs: Programs) -> None:
    """On random figures; the program prints the first property that is wrong."""
    program = programs.link("wire_model.cpp", *CHECKED)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, env=without_preload())
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 100_000


def test_a_ping_pong_over_the_modelled_link_takes_the_published_latency(programs: Programs) -> None:
    """Half of a round trip in simulated time, over one rail and without kernels, against `ib_write_lat`.

    Each message is posted by the code that posts to a NIC: as packets in one write, or as payload and flag in a chain
    of two, of which the flag is what the latency of the payload does not contain.
    """
    program = programs.link("wire_ping.cpp", *CHECKED)
    numbers = (
        PUBLISHED_RAIL.gbytes_per_s,
        PUBLISHED_POSTING.doorbell_us * 1e3,
        PUBLISHED_POSTING.work_request_us * 1e3,
    )
    points = [f"{size}:{us * 1e3}" for size, us in PUBLISHED_LATENCY]
    done = subprocess.run(
        [str(program), *map(str, numbers), *points], capture_output=True, text=True, timeout=120, env=without_preload()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == len(PUBLISHED_LATENCY)
    packets_of = []
    for (size, payload, packets), (published_size, published_us) in zip(lines, PUBLISHED_LATENCY, strict=True):
        assert size == published_size
        assert payload / 1e3 == pytest.approx(published_us, rel=0.05), size
        if packets:
            packets_of.append(size)
            assert packets / 1e3 == pytest.approx(published_us, rel=0.05), size
    assert packets_of == [1 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10]
