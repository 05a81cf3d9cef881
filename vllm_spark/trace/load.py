"""Requests to the leader, so that it has decode steps, and when their tokens arrive."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from typing import Any

from vllm_spark.backend.pair_status.client import LeaderApi, NoAnswerError, StatusError
from vllm_spark.errors import EXIT_LOST, SparkError

_TOKEN_IDS = range(3, 103)  # of prompts: every vocabulary has them
_PROMPT_TOKENS_PER_STEP = 1024  # vLLM takes more of a prompt in one step
_LATER = 10.0
"""Seconds after the end of `run` until a silent connection times out: the end decides first, and is no error."""


class Load:
    """`batch` requests of greedy completions, sent together.

    Args:
        api: the leader's.
        model: its name there.
        prompt_tokens: of each prompt, which are random.
        batch: requests.
        steps: decode steps with all of them that are wanted.
    """

    def __init__(self, api: LeaderApi, model: str, prompt_tokens: int, batch: int, steps: int) -> None:
        self._api, self._model, self._prompt_tokens, self._batch = api, model, prompt_tokens, batch
        beginning = 2 * batch + batch * prompt_tokens // _PROMPT_TOKENS_PER_STEP  # steps in which they begin
        self.tokens = steps + beginning + 16
        self.arrivals: list[list[float]] = [[] for _ in range(batch)]
        """Seconds of `time.monotonic()` at which each request's tokens arrived."""
        self._errors: list[BaseException] = []
        self._stopped = threading.Event()

    def run(self, seconds: float) -> bool:
        """Sends the requests and waits for their ends.

        Returns:
            False if they took longer than `seconds`.

        Raises:
            SparkError: one of them failed.
        """
        deadline = time.monotonic() + seconds
        threads = [
            threading.Thread(target=self._complete, args=(number, seconds), daemon=True)
            for number in range(self._batch)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive() and time.monotonic() < deadline and not self._errors:
                    thread.join(0.1)
        finally:
            self._stopped.set()  # the others close their connections at their next token, and vLLM ends the requests
        if self._errors:
            raise self._errors[0]
        return not any(thread.is_alive() for thread in threads)

    def intervals(self) -> list[float]:
        """Microseconds between tokens of one request, as they arrived."""
        return [(later - earlier) * 1e6 for times in self.arrivals for earlier, later in itertools.pairwise(times)]

    def _complete(self, number: int, seconds: float) -> None:
        generator = random.Random(number)
        body = {
            "model": self._model,
            "prompt": [generator.choice(_TOKEN_IDS) for _ in range(self._prompt_tokens)],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        try:
            with self._api.stream("/v1/completions", body, seconds=seconds + _LATER) as response:
                for line in response:
                    if self._stopped.is_set():
                        return
                    if line.startswith(b"data: {"):
                        self._take(number, json.loads(line[6:]))
        except StatusError as error:
            self._errors.append(_Refused(f"{self._api.url} does not complete the prompts of the trace: {error}"))
        except NoAnswerError as error:
            self._errors.append(error)
        except (OSError, ValueError) as error:
            self._errors.append(NoAnswerError(f"the answer of {self._api.url} broke off: {error}"))

    def _take(self, number: int, piece: dict[str, Any]) -> None:
        if "error" in piece:
            raise ValueError(str(piece["error"].get("message", piece["error"])))
        self.arrivals[number].append(time.monotonic())


class _Refused(SparkError):
    """The server does not take such requests."""

    exit_code = EXIT_LOST
