"""The model of the link (csrc/transport/wire_model.cpp), without a link and without a clock."""

from __future__ import annotations

import subprocess

import pytest

from vllm_spark.collective.link_model import (
    PUBLISHED_FIGURES,
    PUBLISHED_LATENCY,
    PUBLISHED_POSTING,
    PUBLISHED_RAIL,
    RailFigures,
)

from .programs import CHECKED, Programs, without_preload

POSTING = (str(PUBLISHED_POSTING.doorbell_us * 1e3), str(PUBLISHED_POSTING.work_request_us * 1e3))


def rail(figures: RailFigures) -> list[str]:
    """A rail as the programs take it: bytes per nanosecond, then bytes and nanoseconds of each latency."""
    return [str(figures.gbytes_per_s), *(f"{size}:{us * 1e3}" for size, us in figures.latency)]


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
    done = subprocess.run(
        [str(program), *POSTING, *rail(PUBLISHED_RAIL)],
        capture_output=True,
        text=True,
        timeout=120,
        env=without_preload(),
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


TRANSFERS = (
    (1, 4, 4 << 10),
    (1, 16, 4 << 10),
    (1, 4, 16 << 10),
    (8, 32, 4 << 10),
    (8, 8, 16 << 10),
    (64, 32, 16 << 10),
)
"""Messages, pieces of each, bytes of a piece."""


def test_messages_in_pieces_take_as_long_as_posting_or_both_rails_do(programs: Programs) -> None:
    """Whichever is longer, and at most both, with the latency of the last piece: the model loses and adds no time."""
    program = programs.link("wire_load.cpp", *CHECKED)
    figures, posting = PUBLISHED_FIGURES.rails[0], PUBLISHED_POSTING
    done = subprocess.run(
        [str(program), *POSTING, str(PUBLISHED_FIGURES.gbytes_per_s), *rail(figures)],
        input="".join(f"{messages} {pieces} {size}\n" for messages, pieces, size in TRANSFERS),
        capture_output=True,
        text=True,
        timeout=120,
        env=without_preload(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    latency = dict(PUBLISHED_LATENCY)
    for transfer, line in zip(TRANSFERS, done.stdout.splitlines(), strict=True):
        (messages, pieces, size), (ns, *posts) = transfer, map(int, line.split())
        assert sum(posts) == messages * pieces
        assert abs(posts[0] - posts[1]) <= 1, "pieces of one size go over the rails by turns"
        chains = messages * min(2, pieces)  # one for each rail
        posted = chains * posting.doorbell_us + sum(posts) * 2 * posting.work_request_us
        on_wire = max(posts) * (size + 8) / figures.gbytes_per_s / 1e3
        least, most = max(posted, on_wire), posted + on_wire + latency[size]
        assert least <= ns / 1e3 <= most, (transfer, line)
