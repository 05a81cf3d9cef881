"""vLLM's own pair on the CPU build, asked to profile its steps: prints where the profiler ran, as JSON.

python -m tests.serve.profiled_pair MODEL
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from vllm_spark.bench import kernel_profile


def whereabouts(worker: Any) -> tuple[int, int]:
    """The worker's process, and the profilers that run there."""
    return os.getpid(), len(kernel_profile._running)


def main() -> None:
    """Starts the pair, profiles three steps, and one time without any."""
    import vllm

    engine = vllm.LLM(
        sys.argv[1],
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=1,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ).llm_engine
    sampling = vllm.SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False)
    engine.add_request("one", {"prompt_token_ids": [1, 2, 3]}, sampling)
    during: list[list[tuple[int, int]]] = []

    def run_step() -> bool:
        during.append(engine.collective_rpc(whereabouts))
        return bool(engine.step())

    profile = kernel_profile.profile_steps(engine.collective_rpc, run_step, 3)
    engine.collective_rpc(kernel_profile.start)
    answers = engine.collective_rpc(kernel_profile.stop, args=(1,))
    print(
        json.dumps(
            {
                "engine": os.getpid(),
                "profile": profile,
                "during": during,
                "after": engine.collective_rpc(whereabouts),
                "answers": [answer if answer is None else len(answer.kernels) for answer in answers],
            }
        )
    )
    engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
