"""All-reduce and all-gather give the right bits, the same on both ranks, for whatever tensors."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_spark.collective import UsageError
from vllm_spark.collective.link_model import PUBLISHED_FIGURES, WireFigures

from .pair import Pipe, connect, values

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MODES: dict[str, dict[str, Any]] = {
    "direct": {},
    "proxied": {"loopback_mode": "proxied"},
    "proxied over one modelled rail": {"loopback_mode": "proxied", "wire": WireFigures.alpha_beta(3.2, 24.0)},
    "proxied over two modelled rails": {"loopback_mode": "proxied", "wire": PUBLISHED_FIGURES},
}
SLOT, PACKETS = 4096, 512  # small, so that small tensors are chunked


def inputs(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Both ranks' inputs, known to both; a sprinkle of special values in them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) * 10.0 ** (seed % 7 - 3) for _ in range(2)]
    special = torch.tensor([float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 65504.0, 3.3e38, 6e-8])
    for tensor in tensors:
        flat = tensor.view(-1)
        if flat.numel() > 16:
            at = torch.randint(0, flat.numel(), (8,), generator=generator)
            flat[at] = special
    return [tensor.to(dtype) for tensor in tensors]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: NaNs and signed zeros compare by what they are."""
    return tensor.contiguous().view(torch.uint8)


def reduces(rank: int, exchange: Pipe, options: dict[str, Any], sizes: list[int]) -> list[bytes]:
    results = []
    with connect(rank, exchange, slot_bytes=SLOT, packet_bytes=PACKETS, **options) as runtime:
        for seed, size in enumerate(sizes):
            dtype = DTYPES[seed % 3]
            both = inputs(seed, (size,), dtype)
            mine = both[rank].clone()
            total = runtime.all_reduce(mine)
            expected = (both[0].float() + both[1].float()).to(dtype)
            known = ~expected.isnan()
            assert torch.equal(bits(total[known]), bits(expected[known])), (seed, size, dtype)
            assert bool(total[~known].isnan().all()), "NaN stays NaN"
            assert torch.equal(bits(mine), bits(both[rank])), "the input is left alone"
            results.append(bytes(bits(total).numpy()))
    return results


@pytest.mark.parametrize("mode", MODES)
def test_all_reduce_at_every_boundary(mode: str) -> None:
    """Around the packet limit and around slots, one element more and less, in every dtype."""
    edges = [0, 1, 2, 3, 4, 5, 7, 8]
    for edge in (PACKETS, SLOT, 2 * SLOT, 9 * SLOT):
        for width in (2, 4):
            edges += [edge // width + delta for delta in (-2, -1, 0, 1, 2)]
    sizes = [edge for edge in edges for _ in DTYPES]
    first, second = values(reduces, MODES[mode], sizes)
    assert first == second, "both ranks have the same bits"


def reduces_nans(rank: int, exchange: Pipe, dtype: torch.dtype) -> bytes:
    """Every NaN is another one on each rank: sign and payload differ."""
    width = torch.tensor([], dtype=dtype).element_size()
    integers = torch.int32 if width == 4 else torch.int16
    nans = {torch.float32: 0x7F800001, torch.float16: 0x7C01, torch.bfloat16: 0x7F81}[dtype]
    signed = nans - (1 << (8 * width))  # as a negative number: with the sign bit, were it set
    mine = torch.tensor([nans + 3 * rank, signed | -(1 << (8 * width - 1))] * 500, dtype=torch.int64).to(integers)
    with connect(rank, exchange) as runtime:
        total = runtime.all_reduce(mine.view(dtype))
    assert bool(total.isnan().all())
    return bytes(bits(total).numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ranks_have_the_same_nan(dtype: torch.dtype) -> None:
    """Which of two NaNs an addition keeps depends on the processor and on the order of its operands."""
    first, second = values(reduces_nans, dtype)
    assert first == second


def leftovers(rank: int, exchange: Pipe, interval: int, proxied: bool) -> int:
    """How many words of the first 40 sequence numbers this rank's memory still holds after as many collectives."""
    from vllm_spark import _native

    options = _native.Options(
        rank=rank,
        slot_bytes=SLOT,
        packet_bytes=PACKETS,
        depth=2,
        proxied=proxied,
        stripes=1,
        timeout_s=30.0,
        first_sequence=1_000_000,
        largest_message=1 << 20,
        clear_interval=interval,
    )
    native = _native.Runtime(options)
    process, descriptor, *nonce = native.address()
    theirs: tuple[int, int, int, int]
    theirs = struct.unpack("<QQQQ", exchange(struct.pack("<QQQQ", process, descriptor, *nonce)))
    native.connect(*theirs, "the other")
    exchange(b"connected")
    for size in (3, 100, 900, 2000) * 10:
        source, target = torch.full((size,), 1.0 + rank), torch.empty(size)
        native.all_reduce(source.data_ptr(), target.data_ptr(), size, _native.DType.FLOAT32)
        assert bool((target == 3.0).all())
    exchange(b"quiet")
    memory = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    received = memory[: len(memory) // 2]  # what the peer writes lies before what this rank stages
    words = struct.unpack(f"<{len(received) // 8}Q", received[: len(received) // 8 * 8])
    native.close()
    return sum(1_000_000 <= word >> 32 < 1_000_100 for word in words)


@pytest.mark.parametrize("proxied", [False, True])
def test_old_words_are_cleared_before_their_number_comes_round(proxied: bool) -> None:
    """After 2^32 messages a word of an old one would pass for new; with an interval of 4, all 4 slots stay clear."""
    assert values(leftovers, 4, proxied) == (0, 0)
    first, second = values(leftovers, 1 << 30, proxied)
    assert first > 100
    assert second > 100, "the test finds what is not cleared"


@pytest.mark.parametrize("depth", [1, 2, 8, 64])
def test_all_reduce_with_any_depth(depth: int) -> None:
    first, second = values(reduces, {"depth": depth}, [3, 1000, 40_000, 5, 100_000, 2048])
    assert first == second


@pytest.mark.parametrize("mode", MODES)
def test_sequence_numbers_wrap(mode: str) -> None:
    options = {**MODES[mode], "first_sequence": 2**32 - 50}
    first, second = values(reduces, options, [5, 300, 3000] * 40)
    assert first == second


def gathers(rank: int, exchange: Pipe, options: dict[str, Any]) -> None:
    shapes = [(1,), (7,), (3, 5), (4, 1, 6), (2, 3, 4, 5), (0, 4), (4, 0), (300, 7), (1, 75_968), (33, 1000)]
    types = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float64)
    with connect(rank, exchange, slot_bytes=SLOT, packet_bytes=PACKETS, **options) as runtime:
        for seed, shape in enumerate(shapes):
            for dim in range(-len(shape), len(shape)):
                dtype = types[(seed + dim) % len(types)]
                both = [tensor.nan_to_num(0, 9, -9).to(dtype) for tensor in inputs(seed, shape, torch.float32)]
                gathered = runtime.all_gather(both[rank], dim)
                assert torch.equal(gathered, torch.cat(both, dim)), (shape, dim, dtype)
                assert gathered.is_contiguous()


@pytest.mark.parametrize("mode", MODES)
def test_all_gather_along_any_dimension(mode: str) -> None:
    values(gathers, MODES[mode])


VIEWS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda t: t.t(),
    lambda t: t[::2, 1::3],
    lambda t: t[3:4].expand(5, 20),
    lambda t: t[1:, 1:],
)


def odd_tensors(rank: int, exchange: Pipe) -> None:
    with connect(rank, exchange) as runtime:
        base = [torch.arange(400.0).reshape(20, 20) * (number + 1) for number in range(2)]
        for view in VIEWS:
            both = [view(tensor) for tensor in base]
            assert torch.equal(runtime.all_reduce(both[rank]), both[0] + both[1])
            assert torch.equal(runtime.all_gather(both[rank], 0), torch.cat(both, 0))
        # In place, and into a given tensor.
        mine = torch.full((5000,), float(rank + 1))
        assert runtime.all_reduce(mine, out=mine) is mine
        assert torch.equal(mine, torch.full((5000,), 3.0))
        # Not where a part of it is.
        with pytest.raises(UsageError, match="into an overlapping `out`; give the tensor itself"):
            runtime.all_reduce(mine[:4000], out=mine[1000:])
        # Nothing at all, and a scalar.
        assert runtime.all_reduce(torch.empty(0, 4)).shape == (0, 4)
        assert runtime.all_reduce(torch.tensor(2.0 + rank)).item() == 5.0


def test_views_scalars_and_in_place() -> None:
    values(odd_tensors)


def misaligned(rank: int, exchange: Pipe) -> None:
    """Below torch: raw pointers at every offset from 1 to 7."""
    with connect(rank, exchange, slot_bytes=SLOT, packet_bytes=PACKETS) as runtime:
        from vllm_spark._native import DType

        for offset in range(1, 8):
            for count in (5, 100, 5000):
                memory = torch.zeros(4 * count + 16, dtype=torch.uint8)
                target = torch.zeros(4 * count + 16, dtype=torch.uint8)
                number = torch.full((count,), 0.5 + rank)
                memory[offset : offset + 4 * count] = number.view(torch.uint8)
                runtime._native.all_reduce(memory.data_ptr() + offset, target.data_ptr() + offset, count, DType.FLOAT32)
                total = target[offset : offset + 4 * count].clone().view(torch.float32)
                assert torch.equal(total, torch.full((count,), 2.0))
                assert not target[:offset].any(), "nothing before the target was written"
                assert not target[offset + 4 * count :].any(), "nor behind it"


def test_misaligned_pointers() -> None:
    values(misaligned)


def largest(rank: int, exchange: Pipe) -> None:
    with connect(rank, exchange) as runtime:
        count = (64 << 20) // 2
        total = runtime.all_reduce(torch.full((count,), float(rank + 1), dtype=torch.bfloat16))
        assert bool((total == 3.0).all())
        gathered = runtime.all_gather(torch.full((2, 32 << 20), rank, dtype=torch.uint8), 1)
        assert gathered.shape == (2, 64 << 20)
        assert bool((gathered[:, : 32 << 20] == 0).all())
        assert bool((gathered[:, 32 << 20 :] == 1).all())
        assert not runtime.accepts_all_reduce(torch.empty(count + 1, dtype=torch.bfloat16))


def test_64_mib() -> None:
    values(largest)


def mixed(rank: int, exchange: Pipe, options: dict[str, Any], operations: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(11)

    def draw(limit: int) -> int:
        return int(torch.randint(0, limit, (1,), generator=generator))

    pool = [torch.randn(30_000, generator=generator) for _ in range(2)]
    reduces_, gathers_ = 0, 0
    with connect(rank, exchange, slot_bytes=8192, packet_bytes=2048, **options) as runtime:
        for number in range(operations):
            size = draw((40, 600, 2500, 30_000 if number % 50 == 0 else 1500)[draw(4)])
            start = draw(30_000 - size + 1)
            dtype = DTYPES[draw(3)]
            both = [tensor[start : start + size].to(dtype) for tensor in pool]
            if draw(2):
                reduces_ += 1
                assert torch.equal(runtime.all_reduce(both[rank]), (both[0].float() + both[1].float()).to(dtype))
            else:
                gathers_ += 1
                assert torch.equal(runtime.all_gather(both[rank]), torch.cat(both))
        counters = runtime.counters()
        assert (counters.all_reduces, counters.all_gathers) == (reduces_, gathers_)
        return {"sequence": counters.last_sequence, "bytes": counters.all_reduce_bytes}


@pytest.mark.parametrize(
    "mode", ["direct", pytest.param("proxied", marks=pytest.mark.thorough), "proxied over two modelled rails"]
)
def test_ten_thousand_mixed_operations(mode: str) -> None:
    first, second = values(mixed, MODES[mode], 10_000)
    assert first == second
