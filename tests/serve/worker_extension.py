"""A vLLM worker extension for tests: lets a request reach into one rank's worker."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from vllm_spark.executor.heartbeat import Heartbeat
from vllm_spark.executor.leader_session import LeaderSession


class Saboteur:
    """Mixed into the worker by `--worker-extension-cls`; called through `/collective_rpc`."""

    rank: int
    model_runner: Any

    def draw_once_on(self, rank: int) -> dict[str, int]:
        """One draw too many from the global generator of one rank; rank 0 says after how many steps."""
        if self.rank == rank:
            torch.rand(1)
        if self.rank != 0:
            return {}
        (heartbeat,) = (thread for thread in threading.enumerate() if isinstance(thread, Heartbeat))
        report = heartbeat._report
        assert isinstance(report, MethodType)
        pair = report.__self__
        assert isinstance(pair, LeaderSession)
        return {"step": pair.token_digest.state()[0]}

    def draft_otherwise_once_on(self, rank: int) -> None:
        """The next drafts of one rank end with another token than the drafter's."""
        drafter = self.model_runner.drafter
        propose = drafter.propose

        def propose_otherwise(*args: object, **kwargs: object) -> object:
            drafts = propose(*args, **kwargs)
            if isinstance(drafts, torch.Tensor):
                drafts[:, -1] ^= 1
            elif found := [each for each in drafts if each]:
                found[0][-1] ^= 1
            else:
                return drafts  # nothing drafted yet
            del drafter.propose
            return drafts

        if self.rank == rank:
            drafter.propose = propose_otherwise

    def accept_less_once_on(self, rank: int) -> None:
        """The next time that a step accepts drafts, one rank rejects the last of them."""

        def reject_one(module: object, args: object, output: Any) -> None:
            tokens = output.sampled_token_ids  # -1 where a draft was rejected
            accepted = (tokens != -1).sum(dim=1)
            row = int(accepted.argmax())
            if accepted[row] > 1:
                tokens[row, accepted[row] - 1] = -1
                handle.remove()

        if self.rank == rank:
            handle = self.model_runner.rejection_sampler.register_forward_hook(reject_one)

    def sum_of_integers(self) -> dict[str, list[int]]:
        """An all-reduce of the model's group that the runtime does not take, and the count of such before and after."""
        from vllm.distributed.parallel_state import get_tp_group

        from vllm_spark.collective import fallbacks

        before = fallbacks()
        total = get_tp_group().all_reduce(torch.tensor([1 + self.rank, (1 << 40) + self.rank], dtype=torch.int64))
        return {"sum": total.tolist(), "fallbacks": [before, fallbacks()]}

    def collectives_left_to_vllm(self) -> dict[str, int]:
        """For each collective of the model's group how often it was counted when it was called once.

        Where the runtime takes some tensors, this is one that it does not: integers to add up, or one byte more than
        64 MiB to gather. vLLM's CPU build has no all_gatherv, and says so after it was counted.
        """
        from vllm.distributed.parallel_state import get_tp_group

        from vllm_spark.collective import fallbacks

        group = get_tp_group()
        integers = torch.arange(4, dtype=torch.int64)
        large = torch.zeros((64 << 20) + 1, dtype=torch.uint8)
        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: group.all_reduce(integers.clone()),
            "all_gather": lambda: group.all_gather(large, 0),
            "gather": lambda: group.gather(large, 0, 0),
            "reduce_scatter": lambda: group.reduce_scatter(integers, 0),
            "all_gatherv": lambda: group.all_gatherv(integers, 0, [4, 4]),
            "broadcast": lambda: group.device_communicator.broadcast(integers.clone()),
        }
        counted = {}
        for name, call in calls.items():
            before = fallbacks()
            with suppress(NotImplementedError):
                call()
            counted[name] = fallbacks() - before
        return counted

    def sleep_on(self, rank: int, seconds: float, size: int = 0) -> dict[str, object]:
        """Takes so long on one rank; says which rank it was called on, with so many further bytes."""
        if self.rank == rank:
            time.sleep(seconds)
        return {"rank": self.rank} | ({"more": "x" * size} if size else {})

    def grow_on(self, rank: int) -> None:
        """From now on one rank allocates memory, 0.8 GiB a second at most, without end."""

        def grow() -> None:
            kept = []
            while True:
                kept.append(b"x" * (32 << 20))
                time.sleep(0.04)

        if self.rank == rank:
            threading.Thread(target=grow, daemon=True).start()

    def environment(self, *names: str) -> dict[str, object]:
        """Variables of this rank, what vLLM took from one of them when it was imported, and numba's threads."""
        from vllm.utils import torch_utils

        numba = sys.modules.get("numba")
        return {
            "variables": {name: os.environ.get(name) for name in names},
            "layer names": torch_utils._USE_LAYERNAME,
            "numba": numba and numba.config.NUMBA_NUM_THREADS,
        }

    def hang_in_the_next_step_on(self, rank: int, seconds: float) -> None:
        """The next step of one rank begins so much later: its heartbeats go on, and the other one waits for it."""
        self._before_the_next_step_on(rank, lambda: time.sleep(seconds))

    def fail_in_the_next_step_on(self, rank: int) -> None:
        """The next step of one rank raises, with the words of a GPU's error."""

        def fail() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (planted)")

        self._before_the_next_step_on(rank, fail)

    def write_to_a_full_disk_in_the_next_step_on(self, rank: int) -> None:
        """The next step of one rank writes where there is no room."""
        self._before_the_next_step_on(rank, lambda: Path("/dev/full").write_text("no room"))

    def _before_the_next_step_on(self, rank: int, act: Callable[[], object]) -> None:
        runner = self.model_runner
        execute = runner.execute_model

        def execute_late(*args: object, **kwargs: object) -> object:
            del runner.execute_model
            act()
            return execute(*args, **kwargs)

        if self.rank == rank:
            runner.execute_model = execute_late

    def fail_on(self, rank: int) -> None:
        """Raises on one rank, while the other waits for it in an all-reduce."""
        from vllm_spark.collective import installed

        if self.rank == rank:
            raise RuntimeError("planted failure")
        runtime = installed()
        assert runtime is not None
        runtime.all_reduce(torch.ones(8))

    def break_gpu_of(self, rank: int) -> None:
        """A kernel of one rank's GPU accesses memory that is not there, while the other rank waits in an all-reduce."""
        from vllm_spark.collective import installed

        if self.rank == rank:
            table = torch.ones(8, device="cuda")
            table[torch.tensor([1 << 40], device="cuda")] += 1
        runtime = installed()
        assert runtime is not None
        runtime.all_reduce(torch.ones(8, device="cuda"))
        torch.cuda.synchronize()
