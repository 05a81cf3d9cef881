"""The ranks' environments: what is sent, what is compared, and how a session gets its leader's."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

import pytest

from vllm_spark.config.settings import SparkConfig
from vllm_spark.entrypoints import join
from vllm_spark.executor.environment import (
    RECORD_VARIABLE,
    Environment,
    RestartError,
    SessionEnvironment,
    is_compared,
    is_sent,
    merge_environment,
    record_environment,
    recorded_environment,
)
from vllm_spark.records import from_json, to_json

OF_FILES = [
    "VLLM_NCCL_SO_PATH",
    "VLLM_CUDART_SO_PATH",
    "VLLM_CUDA_COMPATIBILITY_PATH",
    "VLLM_DEBUG_DUMP_PATH",
    "VLLM_XLA_CACHE_PATH",
    "VLLM_MODEL_REDIRECT_PATH",
    "VLLM_LORA_RESOLVER_CACHE_DIR",
    "VLLM_FLASHINFER_AUTOTUNE_CACHE_DIR",
    "VLLM_LOGGING_CONFIG_PATH",
    "VLLM_CACHE_ROOT",
    "VLLM_CONFIG_ROOT",
    "VLLM_ASSETS_CACHE",
    "VLLM_MEDIA_CACHE",
    "VLLM_RPC_BASE_PATH",
    "VLLM_TUNED_CONFIG_FOLDER",
]
OF_WORK = [
    "VLLM_USE_TRITON_AWQ",
    "VLLM_USE_LAYERNAME",
    "VLLM_LOGGING_LEVEL",
    "VLLM_MLA_DISABLE",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_MARLIN_INPUT_DTYPE",
    "VLLM_BATCH_INVARIANT",
    "VLLM_KV_CACHE_LAYOUT",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_SOMETHING_NEW",
]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process has none of the variables that matter."""
    for name in list(os.environ):
        if is_sent(name) or is_compared(name) or name == RECORD_VARIABLE:
            monkeypatch.delenv(name)
    return monkeypatch


def test_what_names_files_or_a_machine_stays() -> None:
    assert [name for name in OF_FILES if is_sent(name)] == []
    assert [
        name
        for name in ("VLLM_HOST_IP", "VLLM_PORT", "VLLM_API_KEY", "VLLM_PLUGINS", "VLLM_USE_MODELSCOPE", "HOME")
        if is_sent(name)
    ] == []
    assert [name for name in OF_WORK if not is_sent(name)] == []


def test_every_variable_of_this_vllm_that_names_a_file_stays() -> None:
    """Those whose description in vLLM's source has to do with paths, or whose name says so."""
    source = Path(pytest.importorskip("vllm").__file__).with_name("envs.py").read_text()
    entries = dict(re.findall(r'^    "(VLLM_\w+)": (.*?)(?=^    (?:"|#))', source, re.MULTILINE | re.DOTALL))
    assert len(entries) > 200
    files = {name for name, getter in entries.items() if re.search(r"os\.path|expanduser|tempfile", getter)}
    files |= {name for name in entries if re.search(r"_(PATH|DIR|ROOT|FOLDER|FILE|PORT|IP|HOST)$", name)}
    assert files > set(OF_FILES) - {"VLLM_MEDIA_CACHE"}
    assert sorted(name for name in files if is_sent(name)) == []


def test_which_variables_of_others_are_compared() -> None:
    compared = "NCCL_ALGO TORCHINDUCTOR_MAX_AUTOTUNE TRITON_INTERPRET FLASHINFER_USE_CUDA_NORM CUBLAS_WORKSPACE_CONFIG"
    assert [name for name in compared.split() if not is_compared(name)] == []
    local = (
        "NCCL_SOCKET_IFNAME NCCL_DEBUG TRITON_CACHE_DIR CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_VERSION TORCHELASTIC_RUN_ID"
    )
    assert [name for name in local.split() if is_compared(name)] == []


def test_equal_environments_go_on(environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in {"VLLM_USE_LAYERNAME": "0", "NCCL_ALGO": "Ring", "VLLM_CACHE_ROOT": "/mine"}.items():
        environment.setenv(name, value)
    leader = Environment.of({"VLLM_USE_LAYERNAME": "0", "NCCL_ALGO": "Ring", "VLLM_CACHE_ROOT": "/theirs"})
    SessionEnvironment(None).check(leader)
    assert caplog.messages == []


def test_each_difference_is_named_once(environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    environment.setenv("VLLM_MLA_DISABLE", "1")
    environment.setenv("VLLM_USE_LAYERNAME", "1")
    environment.setenv("NCCL_ALGO", "Ring")
    leader = Environment.of({"VLLM_USE_LAYERNAME": "0", "VLLM_USE_TRITON_AWQ": "1"})
    session = SessionEnvironment(None)
    for _ in range(2):
        with pytest.raises(RestartError) as restart:
            session.check(leader)
    assert caplog.messages == [
        "NCCL_ALGO is 'Ring' here and not set on the leader; set it to the same value on both machines.",
        "VLLM_MLA_DISABLE is '1' here and not set on the leader; the leader's value applies.",
        "VLLM_USE_LAYERNAME is '1' here and '0' on the leader; the leader's value applies.",
        "VLLM_USE_TRITON_AWQ is not set here and '1' on the leader; the leader's value applies.",
    ]
    assert merge_environment(os.environ, restart.value.environment).keys() >= {
        "VLLM_USE_TRITON_AWQ",
        "NCCL_ALGO",
        "PATH",
    }
    assert "VLLM_MLA_DISABLE" not in merge_environment(os.environ, leader)
    assert merge_environment(os.environ, leader)["VLLM_USE_LAYERNAME"] == "0"


def test_a_session_with_the_leaders_environment_does_not_start_again(
    environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if vLLM has changed it while it was imported."""
    leader = Environment.of({"VLLM_USE_LAYERNAME": "0"})
    environment.setenv("VLLM_USE_LAYERNAME", "0")
    session = SessionEnvironment(leader)
    environment.setenv("VLLM_USE_LAYERNAME", "changed")
    environment.setenv("VLLM_OF_THE_IMPORT", "1")
    session.check(leader)
    assert os.environ["VLLM_USE_LAYERNAME"] == "0"
    assert caplog.messages == []
    with pytest.raises(RestartError):
        session.check(Environment.of({"VLLM_USE_LAYERNAME": "1"}))


def test_this_machines_own_share_of_memory_stays(environment: pytest.MonkeyPatch) -> None:
    leader = Environment.of({"VLLM_CPU_KVCACHE_SPACE": "40"})
    with pytest.raises(RestartError):
        SessionEnvironment(None).check(leader)
    assert merge_environment({}, leader) == {"VLLM_CPU_KVCACHE_SPACE": "40"}
    own = {"VLLM_CPU_KVCACHE_SPACE": "8"}
    assert merge_environment(own, leader) == own
    environment.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    SessionEnvironment(None).check(leader)
    SessionEnvironment(None).check(Environment())


def test_values_that_are_not_text_travel(environment: pytest.MonkeyPatch) -> None:
    value = os.fsdecode(b"caf\xe9 \xff")
    environment.setenv("VLLM_SOMETHING_NEW", value)
    record_environment()
    sent = from_json(to_json(recorded_environment()), Environment)
    assert merge_environment({}, sent) == {"VLLM_SOMETHING_NEW": value}


def test_an_engine_offers_what_its_user_gave(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("VLLM_USE_LAYERNAME", "0")
    record_environment()
    environment.setenv("VLLM_DISABLE_SHARED_EXPERTS_STREAM", "1")  # as vLLM does while it makes a configuration
    assert recorded_environment().sent == {"VLLM_USE_LAYERNAME": "0"}
    environment.delenv(RECORD_VARIABLE)
    assert recorded_environment().sent.keys() == {"VLLM_USE_LAYERNAME", "VLLM_DISABLE_SHARED_EXPERTS_STREAM"}


def test_nothing_else_is_taken_from_a_leader() -> None:
    assert merge_environment({"PATH": "/bin"}, Environment({"PATH": "/theirs", "LD_PRELOAD": "x"}, {})) == {
        "PATH": "/bin"
    }


SESSION = """
import json, os, sys
from pathlib import Path
from vllm_spark.executor.environment import Environment
from vllm_spark.entrypoints.join import ADOPTED_VARIABLE, EXIT_RESTART, RESULT_VARIABLE
from vllm_spark.records import to_json
with Path(sys.argv[0]).with_name("seen").open("a") as seen:
    print(os.environ.get("VLLM_USE_LAYERNAME"), os.environ.get("VLLM_MLA_DISABLE"), file=seen)
if ADOPTED_VARIABLE not in os.environ:
    os.write(int(os.environ[RESULT_VARIABLE]), to_json(Environment.of({"VLLM_USE_LAYERNAME": "0"})))
    sys.exit(EXIT_RESTART)
sys.exit(7)
"""


def test_the_next_process_starts_with_the_leaders_environment(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever follows one leader only has not yet done so."""
    (tmp_path / "session.py").write_text(SESSION)
    environment.setattr(join, "python_module", lambda name: [sys.executable, str(tmp_path / "session.py")])
    environment.setenv("VLLM_MLA_DISABLE", "1")
    environment.setenv("VLLMSPARK_SECRET", "one of sixteen bytes")
    assert join.supervise(SparkConfig(), once=True) == 7
    assert (tmp_path / "seen").read_text().splitlines() == ["None 1", "0 None"]


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
