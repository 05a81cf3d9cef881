"""Stock vLLM and the pair, both on the same two hosts at the same time: what is asked of one is asked of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from tests.serve.counters import settled
from tests.serve.hosts import Hosts
from tests.serve.servers import Server, spark_tp2, stock_tp2

from .report import EQUAL, record

T = TypeVar("T")
ANSWER_SECONDS = 300.0


@dataclass(frozen=True)
class SideBySide:
    """Two servers of one model, started with the same arguments."""

    stock: Server
    pair: Server

    @contextmanager
    def same(self, feature: str, asked: str, ask: Callable[[Server], T], counted: Callable[[T], str]) -> Iterator[T]:
        """Asks both servers, one after the other; the answers must be equal. Records the row at the end of the block.

        Args:
            feature: of vLLM, as the table calls it.
            asked: what was asked.
            ask: asks a server.
            counted: what was compared, as text for the table.

        Yields:
            The answer; the block checks that it depends on the feature.
        """
        expected = ask(self.stock)
        answer = ask(self.pair)
        assert answer == expected
        yield answer
        record(feature, asked, f"{EQUAL}: {counted(answer)}")


@contextmanager
def side_by_side(
    hosts: Hosts, model: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Iterator[SideBySide]:
    """Starts both. At the end, no collective of the pair has used vLLM's own path."""
    with (
        stock_tp2(hosts, model, arguments, environment) as stock,
        spark_tp2(hosts, model, arguments, environment) as pair,
    ):
        yield SideBySide(stock, pair)
        assert set(settled(pair)["vllm_spark_fallbacks_total"].values()) == {0}


def request(server: Server, method: str, path: str, **options: Any) -> httpx.Response:
    """A plain HTTP request, with the options of httpx."""
    with httpx.Client(trust_env=False, timeout=ANSWER_SECONDS) as client:
        return client.request(method, server.url + path, **options)


def model_of(server: Server) -> str:
    """The first name under which a server serves its model."""
    return server.client.models.list().data[0].id
