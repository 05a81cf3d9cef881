"""How a follower comes to a leader whose work it can do: it asks one after the other, and outlives their refusals."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError, RefusedError, VersionsError, upper_first, without_numbers
from vllm_spark.executor.channel.framing import Frame, Kind, Lane
from vllm_spark.executor.environment import Environment, RestartError
from vllm_spark.executor.handshake.client import Caller
from vllm_spark.executor.handshake.messages import (
    CONTROL,
    PROGRESS_INTERVAL,
    Offer,
    Progress,
    Reason,
    decode,
    serve_command,
    where_to_type,
)
from vllm_spark.executor.model_files.own import find_own

logger = logging.getLogger("vllm_spark")

AnswerDoctor = Callable[[Lane, Frame, SparkConfig, str], None]

_RETRY_INTERVAL = 0.5  # seconds between two looks for a leader
# Seconds between two lines that say for whom it waits: twice as long each time.
_FIRST_NOTE, _LONGEST_NOTE = 15.0, 900.0
# Seconds until a leader that refuses, or whose model is not here, is asked again: twice as long each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_OFFER_TIMEOUT = 300.0  # seconds for the leader to finish with a follower that did not fit
_ANSWER_TIMEOUT = 5.0


class Found(NamedTuple):
    """A leader that has accepted this follower.

    Attributes:
        caller: opens further lanes of the session.
        control: the first lane.
        offer: what the leader serves.
        own: where this machine has the leader's files, by the leader's names and paths.
    """

    caller: Caller
    control: Lane
    offer: Offer
    own: dict[str, Path]


class LeaderSearch:
    """Looks for a leader until one fits.

    Args:
        config: the follower's settings.
        make_caller: makes what connects to the leader, anew for each try.
        answer_doctor: what to do when a doctor comes in a leader's place.
        check_environment: raises RestartError unless this process has the leader's environment.
        once: end at the first refusal.
    """

    def __init__(
        self,
        config: SparkConfig,
        make_caller: Callable[[], Caller],
        answer_doctor: AnswerDoctor,
        check_environment: Callable[[Environment], None],
        *,
        once: bool,
    ) -> None:
        self._config, self._make_caller, self._answer_doctor, self._once = config, make_caller, answer_doctor, once
        self._check_environment = check_environment
        first = make_caller()
        self._endpoint = first.endpoint
        self._invitation = serve_command(first.host, first.port, config)
        self._since = time.monotonic()
        self._pause = _FIRST_PAUSE
        self._refusal = ""
        self._model = ""

    def announce(self, problem: str = "") -> None:
        """Logs for whom it waits, and why the last try to connect failed."""
        logger.info(
            "Waiting for a leader at %s (%.0f s so far, no limit). %s%s run: %s",
            self._endpoint,
            time.monotonic() - self._since,
            f"{problem} " if problem else "",
            upper_first(where_to_type(self._endpoint)),
            self._invitation,
        )

    def find(self) -> Found:
        """Waits for a leader, and accepts its offer.

        A refusal of either side is logged, the leader is told why, and the next try comes 1 to 30 s later: files may
        have been copied by then, another follower may have left, or another leader may be there. Who is refused for the
        same reason again says nothing more.

        Raises:
            ConfigurationError: the leader has another secret.
            VersionsError: it has other versions.
            RefusedError: `once`, and something does not fit.
            PeerLostError: the leader went away meanwhile.
            RestartError: it has another environment, with which another process must start.
        """
        while True:
            try:
                found = self._try()
            except VersionsError:
                raise
            except RefusedError as refusal:
                if self._once:
                    raise
                self._wait_after(refusal)
            else:
                if self._refusal:
                    logger.info("The leader at %s and this machine fit now.", self._endpoint)
                return found

    def _wait_after(self, refusal: RefusedError) -> None:
        reason = without_numbers(str(refusal))
        if reason != self._refusal:
            self._refusal, self._pause = reason, _FIRST_PAUSE
            logger.error(
                "%s. Waiting on; the leader at %s is asked again at least every %g s.",
                upper_first(str(refusal)),
                self._endpoint,
                _LONGEST_PAUSE,
            )
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _try(self) -> Found:
        caller = self._make_caller()
        control, frame = self._wait_for_offer(caller)
        try:
            offer = decode(frame, Offer)
            return Found(caller, control, offer, self._accept(control, offer))
        except BaseException:
            control.close()
            raise

    def _wait_for_offer(self, caller: Caller) -> tuple[Lane, Frame]:
        """Waits for a leader with a model; lets every doctor that comes before look at this machine."""
        while True:
            control = self._wait_for_leader(caller)
            frame = control.expect(Kind.OFFER, Kind.EXAMINATION, timeout=_OFFER_TIMEOUT)
            if frame.kind is Kind.OFFER:
                return control, frame
            try:
                self._answer_doctor(control, frame, self._config, caller.host)
            except PeerLostError as error:
                logger.warning("The doctor left early: %s.", error)
            control.close()
            self._since = time.monotonic()
            self.announce()

    def _wait_for_leader(self, caller: Caller) -> Lane:
        """Tries to connect until a leader answers, and logs now and then that it waits."""
        next_note = interval = _FIRST_NOTE
        start = time.monotonic()
        while True:
            waited = time.monotonic() - start
            if waited >= next_note:
                self.announce(caller.last_problem)
                interval = min(2 * interval, _LONGEST_NOTE)
                next_note = waited + interval
            lane = caller.connect(CONTROL)
            if lane is not None:
                return lane
            time.sleep(_RETRY_INTERVAL)

    def _accept(self, control: Lane, offer: Offer) -> dict[str, Path]:
        """Looks for everything that the leader offers, and tells it whether all is here."""
        if offer.model != self._model:
            self._model = offer.model
            logger.info("The leader at %s serves %s.", self._endpoint, offer.model)
        try:
            self._check_environment(offer.environment)
        except RestartError:
            control.send(Kind.RESTART, timeout=_ANSWER_TIMEOUT)
            raise
        own: dict[str, Path] = {}
        try:
            with _progress(control) as say:
                for wanted in offer.files:
                    say(f"reading the {wanted.what}")
                    try:
                        place = find_own(wanted, say)
                    except RefusedError:
                        if wanted.required:
                            raise
                        continue
                    own[wanted.place] = place
        except RefusedError as error:
            control.send(Kind.FAILURE, msgspec.json.encode(Reason(str(error))), timeout=_ANSWER_TIMEOUT)
            raise
        control.send(Kind.ACCEPTANCE, timeout=_ANSWER_TIMEOUT)
        return own


@contextlib.contextmanager
def _progress(control: Lane) -> Iterator[Callable[[str], None]]:
    """A context in which the leader is told now and then what this side does; gives what sets that.

    A thread of its own uses the lane until the context is left.
    """
    activity = ["reading files"]
    done = threading.Event()

    def report() -> None:
        while not done.wait(PROGRESS_INTERVAL):
            message = msgspec.json.encode(Progress(activity[0]))
            try:
                control.send(Kind.PROGRESS, message, timeout=_ANSWER_TIMEOUT)
            except PeerLostError:
                return  # the answer meets the same, and says so

    def say(what: str) -> None:
        if what.startswith("downloading"):
            logger.info("%s.", upper_first(what))
        activity[0] = what

    thread = threading.Thread(target=report, name="spark-progress", daemon=True)
    thread.start()
    try:
        yield say
    finally:
        done.set()
        thread.join(2 * _ANSWER_TIMEOUT)
