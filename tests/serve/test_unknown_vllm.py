"""A vLLM that is not as this project knows it: `--spark` refuses, and without it vLLM serves."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_spark.errors import EXIT_USAGE
from vllm_spark.processes.local import CPU_ENVIRONMENT
from vllm_spark.processes.managed import program

from . import prompts
from .hosts import Host
from .servers import COMMON_ARGUMENTS, stock_tp1

KNOWN = "    def create_engine_config(\n        self,\n"


@pytest.fixture(scope="module")
def of_tomorrow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which programs use a copy of the installed vLLM whose `create_engine_config` takes one more."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    installed, copy = Path(spec.origin).parent, tmp_path_factory.mktemp("copy")
    for folder, _, files in os.walk(installed):
        target = copy / "vllm" / Path(folder).relative_to(installed)
        target.mkdir()
        for file in files:
            (target / file).symlink_to(Path(folder, file))
    edited = copy / "vllm" / "engine" / "arg_utils.py"
    source = edited.read_text(encoding="utf-8")
    assert KNOWN in source
    edited.unlink()
    edited.write_text(source.replace(KNOWN, KNOWN + "        of_tomorrow: bool = False,\n"), encoding="utf-8")
    return {"PYTHONPATH": str(copy)}


@pytest.mark.parametrize("way", ["flag", pytest.param("variable", marks=pytest.mark.thorough)])
def test_a_pair_is_refused(host: Host, tiny_moe: Path, of_tomorrow: dict[str, str], way: str) -> None:
    argv = [program("vllm"), "serve", str(tiny_moe), *COMMON_ARGUMENTS]
    environment = CPU_ENVIRONMENT | of_tomorrow | ({"VLLMSPARK_ENABLE": "1"} if way == "variable" else {})
    done = host.run([*argv, "--spark"] if way == "flag" else argv, environment, timeout=180)
    assert done.returncode == EXIT_USAGE
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm serve --spark: --spark does not work with vLLM ")
    assert ": vllm.engine.arg_utils:EngineArgs.create_engine_config has changed (fingerprint " in last
    assert "; install a vLLM of 0.26 to 0.33, or a version of vllm-spark that supports this one" in last
    assert "Traceback" not in done.stderr


def test_an_engine_of_the_users_own_is_refused(host: Host, tiny_moe: Path, of_tomorrow: dict[str, str]) -> None:
    program_of_user = f"from vllm import LLM\nLLM({str(tiny_moe)!r}, additional_config={{'spark': {{}}}})\n"
    done = host.run([program("python"), "-c", program_of_user], CPU_ENVIRONMENT | of_tomorrow, timeout=180)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm_spark.errors.ConfigurationError: --spark does not work with vLLM ")


@pytest.mark.thorough
def test_without_the_flag_it_serves(
    host: Host, tiny_moe: Path, of_tomorrow: dict[str, str], reference_tokens: list[list[int]]
) -> None:
    with stock_tp1(host, tiny_moe, env=of_tomorrow) as server:
        assert prompts.greedy_tokens(server.client, prompts.PROMPTS[:2]) == reference_tokens[:2]
