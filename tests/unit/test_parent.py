"""In whose process an engine runs."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from vllm_spark.processes.child import in_engine_process


def test_only_vllms_own_function_makes_a_process_an_engines() -> None:
    """In a module of that name; a user's function may have the same name."""
    engine = ModuleType("vllm.v1.engine.core")
    vars(engine)["in_engine_process"] = in_engine_process
    exec("def run_engine_core(): return in_engine_process()", engine.__dict__)
    mine: dict[str, Any] = {"in_engine_process": in_engine_process, "__name__": "my_script"}
    exec("def run_engine_core(): return in_engine_process()", mine)
    assert engine.run_engine_core()
    assert not mine["run_engine_core"]()
    assert not in_engine_process()


def answer(connection: Connection) -> None:
    connection.send(in_engine_process())


def test_a_users_own_child_is_none() -> None:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=answer, args=(theirs,))
    child.start()
    assert ours.poll(60)
    assert ours.recv() is False
    child.join(60)
