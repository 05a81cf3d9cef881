"""Draws tokens with speculation for many steps, with and without seeds, and checks that both ranks drew the same ones.

A pair compares its ranks' tokens itself, step by step, and ends if they differ. Here its counters are read at the end
too: the digests over all tokens must be the same after the same number of steps.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.serve.counters import settled
from tests.serve.servers import Server

SAMPLED_STEPS = 10_000
STREAMS = 8
ANSWER_TOKENS = 400
TEMPERATURES = (0.3, 0.7, 1.0)
DRIFT = "different tokens"
"""In the message of the ranks' check."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
        steps: of the engine, with up to `STREAMS` sequences each.
        verified: drafts that were verified, one for each sequence of a step.
        drafted: tokens that were drafted.
        accepted: of these.
        answers: requests.
        seeded: of these.
        same_tokens: whether the ranks' digests over all tokens are equal, and the check printed nothing.
    """

    steps: int
    verified: int
    drafted: int
    accepted: int
    answers: int
    seeded: int
    same_tokens: bool

    @property
    def sentence(self) -> str:
        """For the table."""
        return (
            f"both ranks drew the same tokens in {self.steps} steps, {self.verified} verifications; "
            f"{self.drafted} drafted, {self.accepted} accepted; {self.answers} answers, {self.seeded} with a seed"
        )


def draw_tokens(server: Server, steps: int, until: float) -> Drawn:
    """Asks `STREAMS` prompts at a time, every second one with a seed, until `steps` steps verified drafts.

    Args:
        server: a pair that speculates, and has answered nothing yet.
        steps: of the engine.
        until: time (monotonic) after which no further request begins.

    Raises:
        OpenAIError: the server ended: the ranks drew different tokens, say.
    """
    model = server.client.models.list().data[0].id
    lock = threading.Lock()
    asked = 0
    done = threading.Event()

    def stream() -> int:
        nonlocal asked
        seeded = 0
        while not done.is_set() and time.monotonic() < until:
            with lock:
                asked += 1
                number = asked
            server.client.completions.create(
                model=model,
                prompt=[(7 * number + 3 * place) % 1900 + 3 for place in range(8 + number % 40)],
                max_tokens=ANSWER_TOKENS,
                temperature=TEMPERATURES[number % len(TEMPERATURES)],
                top_p=1.0 if number % 4 else 0.9,
                seed=number if number % 2 else None,
                extra_body={"ignore_eos": True},
            )
            seeded += number % 2
        return seeded

    def watch() -> None:
        while not done.wait(1.0):
            values = server.metrics()
            if values["vllm_spark_steps_total"].get("0", 0) >= steps:
                done.set()

    with ThreadPoolExecutor(STREAMS + 1) as pool:
        watching = pool.submit(watch)
        streams = [pool.submit(stream) for _ in range(STREAMS)]
        try:
            seeded = sum(future.result() for future in streams)
        finally:
            done.set()
        watching.result()
    return _counted(server, asked, seeded)


def _counted(server: Server, answers: int, seeded: int) -> Drawn:
    metrics = settled(server)
    digests = metrics["vllm_spark_token_digest"]
    speculated = server.metrics("vllm:spec_decode_num_")
    verified, drafted, accepted = (
        int(sum(speculated.get(f"vllm:spec_decode_num_{name}_total", {}).values()))
        for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    silent = not any(DRIFT in process.output() for process in server.processes)
    same = digests["0"] == digests["1"] != 0 and silent
    return Drawn(int(metrics["vllm_spark_steps_total"]["0"]), verified, drafted, accepted, answers, seeded, same)
