"""A vLLM worker that does nothing in a decode step, so that what remains is the cost of the executor around it."""

from __future__ import annotations

import time
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

TOKEN = 5


class NullWorker(CPUWorker):  # type: ignore[misc]
    """Loads its model as usual; a step notes when it began and samples the same token for every request."""

    def execute_model(self, scheduler_output: Any) -> None:
        """Notes the time (CLOCK_MONOTONIC, in seconds: one clock for all processes of a machine)."""
        self.__dict__.setdefault("stamps", []).append(time.monotonic())
        self._requests = list(scheduler_output.num_scheduled_tokens)

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        """One token for each request of the step."""
        requests = self._requests
        return ModelRunnerOutput(
            req_ids=requests,
            req_id_to_index={request: index for index, request in enumerate(requests)},
            sampled_token_ids=[[TOKEN] for _ in requests],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def take_stamps(self) -> list[float]:
        """The times noted since the last call."""
        stamps: list[float] = self.__dict__.pop("stamps", [])
        return stamps
