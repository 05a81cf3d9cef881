"""Two users of the two hosts, alice who leads and bob who follows, each with files that the other does not see.

Where both have a path in common, its content may be another one: the follower has a mount namespace of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx

from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from . import prompts
from .adapters import RANK
from .hosts import Hosts
from .process import Process
from .servers import START_SECONDS, Server, spark_leader

SECRET = {"VLLMSPARK_SECRET": "the secret of both machines"}
MODEL, ADAPTER = "spark/tiny", "spark/sql"
PROMPTS = prompts.PROMPTS[:4]
RUNTIME_LORA = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""On both sides: a follower with another environment than its leader's starts once more."""
WITH_ADAPTERS = ("--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2")
OFF = ("--spark-model-sync", "off")
STEP_SECONDS = START_SECONDS
"""Bound for a process to import vLLM, to look at the other one, and to say so."""


class Users(NamedTuple):
    """Two users' folders, and one with what both see under the same path, where the follower's content may differ."""

    alice: Path
    bob: Path
    shared: Path
    at_bobs: Path

    @staticmethod
    def environment(home: Path) -> dict[str, str]:
        """Of a user with that home, who is offline."""
        return {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}


@contextmanager
def join(hosts: Hosts, users: Users, port: str, *more: str, env: Mapping[str, str] | None = None) -> Iterator[Process]:
    """`vllm-spark join` as bob, who sees nothing of alice's, and his own files where both have a path in common."""
    hide = f"mount -t tmpfs none {users.alice} && mount --bind {users.at_bobs} {users.shared}"
    command = [program("vllm-spark"), "join", "--leader", hosts[0].address, "--port", port, *more]
    argv = ["/bin/sh", "-c", f'{hide} && exec "$@"', "sh", *command]
    environment = CPU_ENVIRONMENT | SECRET | RUNTIME_LORA | users.environment(users.bob) | dict(env or {})
    process = hosts[1].popen(argv, environment, "vllm-spark join")
    try:
        yield process
    finally:
        process.terminate()


@contextmanager
def serve(hosts: Hosts, users: Users, port: str, *more: str, env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """`vllm serve MODEL --spark` as alice; not waited for."""
    environment = SECRET | RUNTIME_LORA | users.environment(users.alice) | dict(env or {})
    with spark_leader(hosts, Path(MODEL), port, more, environment, wait=False) as server:
        yield server


def tokens_of(server: Server, model: str) -> list[list[int]]:
    """Greedy answers of a model or an adapter."""
    return [
        (
            server.client.completions.create(
                model=model,
                prompt=prompt,
                max_tokens=32,
                temperature=0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            .choices[0]
            .model_extra
            or {}
        )["token_ids"]
        for prompt in PROMPTS
    ]


def load_adapter(server: Server, name: str, path: Path | str, **more: bool) -> httpx.Response:
    """Has a server load an adapter while it serves."""
    body = {"lora_name": name, "lora_path": str(path), **more}
    with httpx.Client(trust_env=False, timeout=120) as client:
        return client.post(f"{server.url}/v1/load_lora_adapter", json=body)
