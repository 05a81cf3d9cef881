"""What the leader sends arrives whatever it is made of, or is named in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spark.errors import ConfigurationError
from vllm_spark.executor.pickling import dumps_configuration
from vllm_spark.executor.rpc import EXECUTE, EXECUTE_THEN_SAMPLE, SAMPLE, decode_call, decode_header, encode_call

SENDING = """
import sys
from types import SimpleNamespace
from vllm_spark.executor.rpc import encode_call, encode_result
from vllm_spark.executor.pickling import dumps_configuration

class Own:
    def __init__(self, value): self.value = value
    def double(self): return 2 * self.value

def of_script(worker, own): return own.double()

made = {
    "configuration": lambda: dumps_configuration(
        SimpleNamespace(model_config=SimpleNamespace(hf_overrides=of_script, own=Own(4))), "VllmConfig"
    ),
    "call": lambda: encode_call((7, b"12345678"), of_script, (Own(21),), {}),
    "result": lambda: encode_result(Own(3), 1),
    "step": lambda: encode_call((7, b"12345678"), "execute_model",
                                (SimpleNamespace(scheduled_new_reqs=[Own(5)]),), {}),
}
sys.stdout.buffer.write(made[sys.argv[1]]())
"""


def sent(what: str) -> bytes:
    """What a user's script sends, whose classes no other process can import."""
    return subprocess.run([sys.executable, "-c", SENDING, what], capture_output=True, timeout=60, check=True).stdout


def test_a_configuration_with_functions_and_classes_of_a_script() -> None:
    from vllm_spark.executor.pickling import loads_configuration

    model = loads_configuration(sent("configuration")).model_config
    assert model.own.double() == 8
    assert model.hf_overrides(None, model.own) == 8


def test_a_call_with_functions_and_classes_of_a_script() -> None:
    payload = sent("call")
    assert decode_header(payload) == (7, b"12345678", 0)
    call = decode_call(payload)
    assert callable(call.method)
    assert call.method("worker", *call.args) == 42


def test_a_step_with_a_new_request_and_a_result_with_classes_of_a_script() -> None:
    from vllm_spark.executor.rpc import decode_reply

    assert decode_call(sent("step")).args[0].scheduled_new_reqs[0].double() == 10
    assert decode_reply(sent("result")).double() == 6


@pytest.mark.parametrize("method", [EXECUTE, EXECUTE_THEN_SAMPLE, SAMPLE])
def test_a_step_of_running_requests_is_sent_without_a_look_at_its_classes(method: str) -> None:
    step = SimpleNamespace(scheduled_new_reqs=[], req_ids=["a"])
    plain = encode_call((1, bytes(8)), method, (step,), {})
    assert b"cloudpickle" not in plain
    assert decode_call(plain) == (method, (step,), {})


def test_arguments_that_cannot_be_sent_are_told_with_their_call() -> None:
    with pytest.raises(TypeError, match=r"^the call of lock_all cannot be sent to the follower: .*lock"):
        encode_call((1, bytes(8)), "lock_all", (threading.Lock(),), {})


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (threading.Lock(), r"VllmConfig\.model_config\.hf_overrides is of the type _thread\.lock"),
        ({"a": [1, (n for n in "")]}, r"VllmConfig\.model_config\.hf_overrides\.a\.1 is of the type generator"),
    ],
)
def test_the_part_of_a_configuration_that_cannot_be_sent_is_named(part: Any, named: str) -> None:
    configuration = SimpleNamespace(fine=1, model_config=SimpleNamespace(model="m", hf_overrides=part))
    with pytest.raises(ConfigurationError, match=rf"^{named}, which cannot be sent .*; give a value that can be pickl"):
        dumps_configuration(configuration, "VllmConfig")


REMOTE_CODE = """
from transformers import PretrainedConfig

class OwnConfig(PretrainedConfig):
    model_type = "own"
    def __init__(self, answer=0, **kwargs):
        self.answer = answer
        super().__init__(**kwargs)
"""

READ = """
import sys
from types import SimpleNamespace
from transformers import AutoConfig
from vllm_spark.executor.pickling import dumps_configuration
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
sys.stdout.buffer.write(dumps_configuration(SimpleNamespace(hf_config=config), "VllmConfig"))
"""

SEND_ON = """
import sys
from vllm_spark.executor.pickling import dumps_configuration, loads_configuration
configuration = loads_configuration(sys.stdin.buffer.read())
assert "transformers_modules" not in sys.modules
sys.stdout.buffer.write(dumps_configuration(configuration, "VllmConfig"))
"""

ARRIVE = """
import sys
from vllm_spark.executor.pickling import loads_configuration
config = loads_configuration(sys.stdin.buffer.read()).hf_config
print(type(config).__name__, config.answer)
"""


def test_a_configuration_class_of_the_models_own(tmp_path: Path) -> None:
    """Read by the API server, sent to vLLM's engine, and on to the follower: only the first has the code."""
    own = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}, "answer": 42}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "configuration_own.py").write_text(REMOTE_CODE)
    payload = b""
    for program in (READ, SEND_ON, ARRIVE):
        argv = [sys.executable, "-c", program, str(tmp_path)]
        payload = subprocess.run(argv, input=payload, capture_output=True, timeout=120, check=True).stdout
    assert payload.split() == [b"OwnConfig", b"42"]
