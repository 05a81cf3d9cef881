"""What collectives on CUDA tensors compute, eager and in CUDA graphs, direct and through the proxy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch

from vllm_spark import _native
from vllm_spark.bench.gpu_ranks import GpuPair
from vllm_spark.collective import DeviceRuntime, LaunchShape, RuntimeOptions, UsageError
from vllm_spark.collective.cuda_runtime import KERNELS
from vllm_spark.collective.link_model import PUBLISHED_FIGURES
from vllm_spark.collective.runtime import native_options

KIB, MIB = 1 << 10, 1 << 20
MODES = [
    pytest.param({}, id="direct"),
    pytest.param({"loopback_mode": "proxied"}, id="proxied"),
    pytest.param({"loopback_mode": "proxied", "wire": PUBLISHED_FIGURES}, id="modelled wire"),
    pytest.param({"transport": "verbs"}, id="verbs"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda x: x.t(),
    "columns": lambda x: x[:, 3:],
    "misaligned": lambda x: x.view(-1)[1:],
}
MakePair = Callable[..., GpuPair]


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random numbers that are the same wherever they are made, on the CPU."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def expected_sum(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    both = [values(rank, shape, dtype, seed).float() for rank in (0, 1)]
    return (both[0] + both[1]).to(dtype)


def all_reduced(pair: GpuPair, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    def body(rank: int) -> torch.Tensor:
        return pair.runtimes[rank].all_reduce(values(rank, shape, dtype, seed).cuda())

    return [result.cpu() for result in pair.run(body)]


def all_gathered(pair: GpuPair, shape: tuple[int, ...], dtype: torch.dtype, dim: int) -> list[torch.Tensor]:
    def body(rank: int) -> torch.Tensor:
        return pair.runtimes[rank].all_gather(values(rank, shape, dtype).cuda(), dim)

    return [result.cpu() for result in pair.run(body)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_of_every_kind_of_size(make_pair: MakePair, mode: dict[str, Any], dtype: torch.dtype) -> None:
    pair = make_pair(**mode)
    sizes = [0, 1, 3, 5, 64, 2048, 4095, 4096, 4097, 20_001, MIB // 2 + 7, 3 * MIB + 1]
    for seed, size in enumerate(sizes):
        expected = expected_sum((size,), dtype, seed)
        for result in all_reduced(pair, (size,), dtype, seed):
            assert torch.equal(result, expected), f"{size} elements"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_last_message_with_empty_pieces(make_pair: MakePair, mode: dict[str, Any], depth: int) -> None:
    """Blocks without a part in the last message hold back the next collective all the same."""
    pair = make_pair(slot_bytes=64 * KIB, depth=depth, **mode)
    size, rounds = 1_040_400 // 4, 60  # 16 messages, the last with 29 of 32 pieces

    def body(rank: int) -> list[torch.Tensor]:
        inputs = [torch.full((size,), 1.0 + rank + turn, device="cuda") for turn in range(rounds)]
        torch.cuda.current_stream().synchronize()
        return [pair.runtimes[rank].all_reduce(tensor) for tensor in inputs]

    for results in pair.run(body):
        assert all(result.eq(3.0 + 2 * turn).all() for turn, result in enumerate(results))
    for runtime in pair.runtimes:
        runtime.check()


@pytest.mark.parametrize("mode", MODES)
def test_random_operations_in_a_row(make_pair: MakePair, mode: dict[str, Any]) -> None:
    """Slots are used again and again, by messages of all sizes; nothing waits for the host in between."""
    pair = make_pair(slot_bytes=64 * KIB, depth=2, **mode)
    generator = torch.Generator().manual_seed(7)
    sizes = [int(2 ** (19 * float(torch.rand(1, generator=generator)))) for _ in range(300)]

    def body(rank: int) -> list[torch.Tensor]:
        inputs = [values(rank, (size,), torch.bfloat16, seed).cuda() for seed, size in enumerate(sizes)]
        torch.cuda.current_stream().synchronize()
        return [pair.runtimes[rank].all_reduce(tensor) for tensor in inputs]

    results = pair.run(body)
    for rank in (0, 1):
        pair.runtimes[rank].check()
        for seed, size in enumerate(sizes):
            assert torch.equal(results[rank][seed].cpu(), expected_sum((size,), torch.bfloat16, seed))


@pytest.mark.parametrize("mode", MODES)
def test_slots_that_are_cleared_again_and_again(make_pair: MakePair, mode: dict[str, Any]) -> None:
    """As they are once in 2^30 messages, with packets and payloads in turn."""
    pair = make_pair(slot_bytes=64 * KIB, depth=4, clear_interval=16, **mode)
    sizes = [17, 4096, 40_000, 3, 200_000] * 30

    def body(rank: int) -> list[torch.Tensor]:
        inputs = [torch.full((size,), 1.0 + rank + turn % 7, device="cuda") for turn, size in enumerate(sizes)]
        torch.cuda.current_stream().synchronize()
        return [pair.runtimes[rank].all_reduce(tensor) for tensor in inputs]

    for results in pair.run(body):
        assert all(result.eq(3.0 + 2 * (turn % 7)).all() for turn, result in enumerate(results))
    for runtime in pair.runtimes:
        runtime.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((4, 37_984), 1), ((1, 75_968), -1), ((6, 40), 0), ((3, 5, 16), 1), ((3, 5), 1), ((7,), 0), ((2, 0), 1)],
)
def test_all_gather(make_pair: MakePair, mode: dict[str, Any], shape: tuple[int, ...], dim: int) -> None:
    pair = make_pair(**mode)
    for dtype in (torch.bfloat16, torch.int64, torch.uint8):
        expected = torch.cat([values(rank, shape, dtype) for rank in (0, 1)], dim)
        for result in all_gathered(pair, shape, dtype, dim):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(
    "slots",
    [{"packet_bytes": 128 * KIB}, {"packet_bytes": 0}, {"packet_bytes": 0, "slot_bytes": 64 * KIB, "depth": 1}],
    ids=["packets", "payload", "payload, two small slots"],
)
@pytest.mark.parametrize("mode", MODES)
def test_sum_in_place(make_pair: MakePair, mode: dict[str, Any], slots: dict[str, Any], late: int) -> None:
    """The peer's half is there before a late rank has sent its own, which must not be overwritten until then."""
    pair = make_pair(**mode, **slots)
    sizes = [2048, 40_001, 1_040_400 // 2, 3 * MIB]

    def body(rank: int) -> list[torch.Tensor]:
        tensors = [values(rank, (size,), torch.bfloat16, size).cuda() for size in sizes]
        for tensor in tensors:
            if rank == late:
                torch.cuda._sleep(10_000_000)  # cycles
            assert pair.runtimes[rank].all_reduce(tensor, out=tensor) is tensor
        return tensors

    for results in pair.run(body):
        for size, result in zip(sizes, results, strict=True):
            assert torch.equal(result.cpu(), expected_sum((size,), torch.bfloat16, size)), f"{size} elements"


def test_output_that_overlaps_its_input(make_pair: MakePair) -> None:
    pair = make_pair()
    whole = torch.zeros(4096, dtype=torch.bfloat16, device=pair.devices[0])
    with pytest.raises(UsageError, match="into an overlapping"):
        pair.run(lambda rank: rank or pair.runtimes[0].all_reduce(whole[:2048], out=whole[1024:3072]))
    for result in all_reduced(pair, (100,), torch.bfloat16):  # nothing was sent
        assert torch.equal(result, expected_sum((100,), torch.bfloat16))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_inputs_that_are_strided_or_misaligned(
    make_pair: MakePair, cut: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    pair = make_pair()
    whole = [values(rank, (64, 96), torch.float16) for rank in (0, 1)]
    expected = (cut(whole[0]).float() + cut(whole[1]).float()).half()
    for result in pair.run(lambda rank: pair.runtimes[rank].all_reduce(cut(whole[rank].cuda()))):
        assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_graphs_and_eager_calls_interleaved(make_pair: MakePair, mode: dict[str, Any]) -> None:
    """Two graphs, replayed in changing order with eager calls between; inputs change between replays."""
    pair = make_pair(**mode)
    small, large = (4, 512), (64, 2048)

    def capture(rank: int) -> Any:
        runtime = pair.runtimes[rank]
        inputs = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in (small, large)]
        graphs, outputs = [], []
        for tensor in inputs:
            with pair.capture() as graph:
                first = runtime.all_reduce(tensor)
                outputs.append(runtime.all_gather(runtime.all_reduce(first), 0))
            graphs.append(graph)
        return inputs, graphs, outputs

    captured = pair.run(capture)
    for turn, which in enumerate([0, 1, 1, 0, 0, 1, 0]):
        shape = (small, large)[which]

        def replay(rank: int, which: int = which, shape: tuple[int, ...] = shape, turn: int = turn) -> Any:
            inputs, graphs, outputs = captured[rank]
            inputs[which].copy_(values(rank, shape, torch.bfloat16, turn))
            graphs[which].replay()
            eager = pair.runtimes[rank].all_reduce(inputs[which])
            return outputs[which].clone(), eager

        once = expected_sum(shape, torch.bfloat16, turn)
        twice = (once.float() + once.float()).bfloat16()
        for in_graph, eager in pair.run(replay):
            assert torch.equal(in_graph.cpu(), torch.cat([twice, twice]))
            assert torch.equal(eager.cpu(), once)


def test_sequence_numbers_wrap_around(make_pair: MakePair) -> None:
    pair = make_pair(first_sequence=2**32 - 3, slot_bytes=64 * KIB)
    assert pair.runtimes[0].counters().last_sequence == 2**32 - 4
    for seed in range(12):
        for result in all_reduced(pair, (3 * 32 * KIB * (seed % 2) + 100,), torch.bfloat16, seed):
            assert torch.equal(result, expected_sum((3 * 32 * KIB * (seed % 2) + 100,), torch.bfloat16, seed))
    # Six messages, and six times four: 30 from 2^32 - 4 on.
    assert pair.runtimes[0].counters().last_sequence == 26


def test_more_blocks_than_run_at_once(make_pair: MakePair) -> None:
    """Of too many as many as the GPU has multiprocessors; past that check, the native runtime refuses."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    options = RuntimeOptions(packet_bytes=0, launch=LaunchShape(payload_blocks=64))
    fitting = DeviceRuntime._limited_to_device(options)
    assert fitting.launch == LaunchShape(payload_blocks=min(64, multiprocessors))
    shape = _native.LaunchShape(**{**asdict(LaunchShape()), "payload_blocks": 100_000})
    with pytest.raises(UsageError, match=r"payload_blocks 100000 is too many for this GPU, which runs \d+ blocks"):
        _native.DeviceRuntime(native_options(0, options, 1), shape, KERNELS.read_bytes())


def test_slots_smaller_than_a_block(make_pair: MakePair) -> None:
    pair = make_pair(slot_bytes=64, packet_bytes=0)
    for size in (1, 33, 40_000):
        for result in all_reduced(pair, (size,), torch.bfloat16):
            assert torch.equal(result, expected_sum((size,), torch.bfloat16))


@pytest.mark.parametrize("mode", MODES)
def test_packets_of_several_rounds(make_pair: MakePair, mode: dict[str, Any]) -> None:
    """More packets than 64 blocks have threads: each thread has several."""
    pair = make_pair(launch=(LaunchShape(packet_threads=32),) * 2, packet_bytes=256 * KIB, **mode)
    for seed, size in enumerate((8191, 8192, 8193, 100_003, 128 * KIB)):
        for result in all_reduced(pair, (size,), torch.bfloat16, seed):
            assert torch.equal(result, expected_sum((size,), torch.bfloat16, seed)), f"{size} elements"


def test_counters(make_pair: MakePair) -> None:
    pair = make_pair(slot_bytes=64 * KIB)
    for _ in range(3):
        all_reduced(pair, (2048,), torch.bfloat16)
    all_reduced(pair, (100 * KIB,), torch.bfloat16)
    pair.run(lambda rank: pair.runtimes[rank].all_gather(values(rank, (8, 8), torch.float32).cuda()))
    for runtime in pair.runtimes:
        counters = runtime.counters()
        assert (counters.all_reduces, counters.all_reduce_bytes) == (4, 3 * 4096 + 200 * KIB)
        assert (counters.all_gathers, counters.all_gather_bytes) == (1, 256)
        assert (counters.packet_messages, counters.payload_messages, counters.chunked_operations) == (4, 4, 1)
        assert counters.last_sequence == 8
