"""The doctor's visit: it listens where a leader would, and asks the follower that comes how its machine is.

Nothing is unpickled here: both messages are JSON, on a lane that both sides have authenticated.
"""

from __future__ import annotations

import logging

import msgspec

from vllm_spark.config.settings import SparkConfig
from vllm_spark.doctor.examination import Machine, examine
from vllm_spark.doctor.system import System
from vllm_spark.errors import PeerLostError
from vllm_spark.executor.channel.addresses import host_name, leader_address
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import MIB, Connection, Frame, Kind
from vllm_spark.executor.channel.secret import load_secret
from vllm_spark.executor.handshake.messages import Reason, decode
from vllm_spark.executor.handshake.server import Listener

logger = logging.getLogger("vllm_spark")

_EXAMINATION_SECONDS = 120.0
"""How long a machine may take to look at itself: programs that are asked may take some 20 s each."""

_SEND_SECONDS = 10.0
_FAREWELL = "the doctor is done"


class Examination(msgspec.Struct, frozen=True):
    """What the doctor says when it asks."""

    host: str


def visit(config: SparkConfig, patience: float) -> Machine:
    """Waits at most `patience` seconds for a follower, and returns what it says of its machine.

    Raises:
        SparkError: nobody came, or it did not answer; or a setting is unusable.
    """
    address = leader_address(config)
    context = tls_context(load_secret(config, address), "leader")
    listener = Listener(
        address, config.port, context, config.max_frame_mib * MIB, config.secret_file, any_versions=True
    )
    try:
        hello, lane = listener.wait_for_any_follower(patience)
    finally:
        # Before a word is said: once dismissed, the follower looks for a leader again, and must not find this one.
        listener.close()
    logger.info("The follower on %s came; asking how its machine is.", hello.host)
    try:
        lane.send(Kind.CHECK_REQUEST, msgspec.json.encode(Examination(host_name())), timeout=_SEND_SECONDS)
        machine = decode(lane.expect(Kind.CHECK_REPORT, timeout=_EXAMINATION_SECONDS), Machine)
        lane.send(Kind.LEAVE, msgspec.json.encode(Reason(_FAREWELL)), timeout=_SEND_SECONDS)
    except PeerLostError as error:
        raise PeerLostError(
            f"{error}; a vllm-spark of another version there may know no doctor: see what its vllm-spark join printed"
        ) from None
    finally:
        lane.close()
    return machine


def answer(lane: Connection, question: Frame, config: SparkConfig, leader: str) -> None:
    """The follower's side: looks at this machine, says what it found, and waits for the farewell.

    Args:
        lane: the control lane.
        question: the EXAMINATION.
        config: the follower's settings.
        leader: address of the doctor's machine.

    Raises:
        PeerLostError: the doctor is gone.
    """
    logger.info("The doctor on %s asks how this machine is.", decode(question, Examination).host)
    machine = examine(System(), config, leader, thorough=True)
    lane.send(Kind.CHECK_REPORT, msgspec.json.encode(machine), timeout=_SEND_SECONDS)
    lane.expect(Kind.LEAVE, timeout=_EXAMINATION_SECONDS)
