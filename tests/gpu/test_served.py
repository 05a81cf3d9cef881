"""A pair of real vLLM servers on two GPUs: over emulated rails, also while they are out, and with a broken GPU."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

from benchmarks.servers import Place, start_server
from tests.models.answers import prompts
from tests.models.gpu_rows import MAX_MODEL_LENGTH, ROWS
from tests.models.on_gpus import SMALL_ON_A_GPU, as_server
from tests.native.emulated_nics import EmulatedNics
from tests.serve.development import DEVELOPMENT, EXTENSION, post
from tests.serve.servers import Server

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="each rank of a serving pair needs a GPU of its own"),
    pytest.mark.timeout(560),
]
START_SECONDS = 240.0
OUTAGE_SECONDS = 3.0
LONG_ANSWER = 800
ROW = ROWS["bfloat16_compiled"]  # with graphs, which are replayed over an outage
END_SECONDS = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ROW.make_model(tmp_path_factory.mktemp("served") / "model")


@contextmanager
def serving(
    folder: Path, model: Path, kinds: dict[str, dict[str, str]], *arguments: str
) -> Iterator[dict[str, Server]]:
    """A server of each kind with its variables, healthy; they load at the same time."""
    place = Place("cuda", folder / "logs", folder / "caches")
    place.logs.mkdir()
    common = [*ROW.serve_arguments("cuda", model), "--max-model-len", str(MAX_MODEL_LENGTH), *SMALL_ON_A_GPU]
    with ExitStack() as stack:
        servers = {}
        for kind, variables in kinds.items():
            servers[kind] = start_server(kind, kind, model, [*common, *arguments], place, environment=variables)
            stack.callback(servers[kind].stop, 5.0)
        for started in servers.values():
            started.wait_until_healthy(START_SECONDS)
        yield {kind: as_server(started) for kind, started in servers.items()}


def streamed_tokens(server: Server, first: threading.Event) -> list[int]:
    """A long greedy answer in a stream; `first` is set when it has begun."""
    stream = server.client.completions.create(
        model=server.client.models.list().data[0].id,
        prompt=prompts([33])[0],
        max_tokens=LONG_ANSWER,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    tokens: list[int] = []
    for chunk in stream:
        for choice in chunk.choices:
            tokens += (choice.model_extra or {}).get("token_ids") or []
        first.set()
    return tokens


def test_tokens_over_rails_are_those_of_direct_mode(tmp_path: Path, model: Path, nics: EmulatedNics) -> None:
    """One after the other, and in a streamed answer while one rail, the other and both are out for three seconds."""
    rails = dict(nics.environment)
    rails["LD_LIBRARY_PATH"] += f":{os.environ.get('LD_LIBRARY_PATH', '')}"
    with serving(tmp_path, model, {"spark": {}, "spark-verbs": rails}) as servers:
        direct, over_rails = servers["spark"], servers["spark-verbs"]
        lengths = ROW.served.prompt_lengths
        assert ROW.served.ask(over_rails, lengths) == ROW.served.ask(direct, lengths)
        expected = streamed_tokens(direct, threading.Event())
        assert len(expected) == LONG_ANSWER
        for out in ((0,), (1,), (0, 1)):
            begun = threading.Event()

            def break_rails(out: tuple[int, ...] = out, begun: threading.Event = begun) -> None:
                begun.wait(END_SECONDS)
                with nics.fault("cut", 1, *out):
                    time.sleep(OUTAGE_SECONDS)

            thread = threading.Thread(target=break_rails)
            thread.start()
            assert streamed_tokens(over_rails, begun) == expected, f"rails {out} were out"
            thread.join()
        counted = over_rails.metrics()
        assert counted["vllm_spark_fallbacks_total"] == {"0": 0, "1": 0}
        assert counted["vllm_spark_rail_failures_total"]["0"] >= 4
        assert ROW.served.ask(over_rails, lengths) == ROW.served.ask(direct, lengths)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_broken_gpu_ends_both_sides_with_a_sentence(tmp_path: Path, model: Path, rank: int) -> None:
    with serving(tmp_path, model, {"spark": DEVELOPMENT}, *EXTENSION) as servers:
        server = servers["spark"]
        with suppress(OSError):  # the server may end before it has answered
            assert post(server, "/collective_rpc", {"method": "break_gpu_of", "args": [rank]}) >= 400
        for process in server.processes:
            assert process.wait(END_SECONDS) != 0, process.name
        assert any("illegal memory access" in process.output() for process in server.processes)
