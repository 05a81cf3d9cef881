"""The follower's search for a leader: it connects, answers the offer, and retries after a refusal."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vllm_spark.config.settings import SparkConfig
from vllm_spark.errors import PeerLostError, RefusedError, VersionsError, upper_first, without_numbers
from vllm_spark.executor.channel.framing import Connection, Frame, Kind
from vllm_spark.executor.environment import RestartError
from vllm_spark.executor.handshake.client import Connector
from vllm_spark.executor.handshake.messages import (
    CONTROL,
    PROGRESS_INTERVAL,
    CopyState,
    Offer,
    Progress,
    Reason,
    decode_frame,
    serve_command,
    where_to_run,
)
from vllm_spark.executor.model_files.loaded import FileKey, LoadedFiles
from vllm_spark.executor.model_files.own import find_own
from vllm_spark.executor.model_sync.fetch_from_follower import answer_search
from vllm_spark.executor.model_sync.fetch_from_leader import fetch_from_leader, may_be_copied
from vllm_spark.executor.model_sync.progress import CopyDisplay
from vllm_spark.records import to_json

logger = logging.getLogger("vllm_spark")

AnswerDoctor = Callable[[Connection, Frame, SparkConfig, str], None]

_RETRY_INTERVAL = 0.5  # seconds between two attempts to connect
# Seconds between two log lines while it waits: doubled each time.
_FIRST_LOG, _LONGEST_LOG = 15.0, 900.0
# Seconds until it retries after a refusal by either side: doubled each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_OFFER_TIMEOUT = 300.0  # seconds for the leader to finish with another follower that does not fit
_ANSWER_TIMEOUT = 5.0


class Found(NamedTuple):
    """A leader that has accepted this follower.

    Attributes:
        connector: opens further connections of the session.
        control: the control connection.
        offer: what the leader serves.
        own: where this machine has the leader's files, by the names, revisions and paths of the leader's configuration.
    """

    connector: Connector
    control: Connection
    offer: Offer
    own: dict[FileKey, Path]


class LeaderSearch:
    """Searches for a leader until one fits.

    Args:
        config: the follower's settings.
        make_connector: makes the connector of a session, for each attempt.
        answer_doctor: called when `vllm-spark doctor` listens there instead of a leader.
        check_offer: raises RestartError unless this process has the leader's environment, and RefusedError unless this
            machine has the memory for its rank.
        once: end at the first refusal.
    """

    def __init__(
        self,
        config: SparkConfig,
        make_connector: Callable[[], Connector],
        answer_doctor: AnswerDoctor,
        check_offer: Callable[[Offer], None],
        *,
        once: bool,
    ) -> None:
        self._config, self._make_connector, self._answer_doctor, self._once = (
            config,
            make_connector,
            answer_doctor,
            once,
        )
        self._check_offer = check_offer
        first = make_connector()
        self._endpoint = first.endpoint
        self._serve_command = serve_command(first.host, first.port, config)
        self._since = time.monotonic()
        self._pause = _FIRST_PAUSE
        self._refusal = ""
        self._model = ""

    def announce(self, problem: str = "") -> None:
        """Logs which leader it waits for, and why the last attempt to connect failed."""
        logger.info(
            "Waiting for a leader at %s (%.0f s so far, no limit). %s%s run: %s",
            self._endpoint,
            time.monotonic() - self._since,
            f"{problem} " if problem else "",
            upper_first(where_to_run(self._endpoint)),
            self._serve_command,
        )

    def find(self) -> Found:
        """Waits for a leader, and accepts its offer.

        A refusal by either side is logged, the leader gets the reason, and the next attempt follows 1 to 30 s later:
        files may have been copied by then, another follower may have left, or another leader may have started. A
        refusal for the same reason is logged once.

        Raises:
            ConfigurationError: the leader has another secret.
            VersionsError: it has other versions.
            RefusedError: `once`, and something does not fit.
            PeerLostError: the connection to the leader was lost.
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
                self._wait_after_refusal(refusal)
            else:
                if self._refusal:
                    logger.info("The leader at %s accepts this follower now.", self._endpoint)
                return found

    def _wait_after_refusal(self, refusal: RefusedError) -> None:
        reason = without_numbers(str(refusal))
        if reason != self._refusal:
            self._refusal, self._pause = reason, _FIRST_PAUSE
            logger.error(
                "%s. Retrying the leader at %s, at least every %g s.",
                upper_first(str(refusal)),
                self._endpoint,
                _LONGEST_PAUSE,
            )
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _try(self) -> Found:
        connector = self._make_connector()
        control, frame = self._wait_for_offer(connector)
        try:
            offer = decode_frame(frame, Offer)
            return Found(connector, control, offer, self._accept(connector, control, offer))
        except BaseException:
            control.close()
            raise

    def _wait_for_offer(self, connector: Connector) -> tuple[Connection, Frame]:
        """Waits for a leader's offer; answers whatever else listens there before."""
        while True:
            with contextlib.ExitStack() as unused:
                control = self._wait_for_leader(connector)
                unused.callback(control.close)
                frame = control.expect(Kind.OFFER, Kind.CHECK_REQUEST, Kind.SEARCH, timeout=_OFFER_TIMEOUT)
                if frame.kind is Kind.OFFER:
                    unused.pop_all()
                    return control, frame
                self._answer(control, frame, connector)
            self._since = time.monotonic()
            if frame.kind is Kind.CHECK_REQUEST:
                self.announce()

    def _answer(self, control: Connection, frame: Frame, connector: Connector) -> None:
        """Answers a leader that asks for a model, or `vllm-spark doctor`."""
        searches = frame.kind is Kind.SEARCH
        try:
            if searches:
                answer_search(control, frame, connector, self._config)
            else:
                self._answer_doctor(control, frame, self._config, connector.host)
        except PeerLostError as error:
            peer = "the leader that asked for a model" if searches else "vllm-spark doctor"
            logger.warning("The connection to %s was lost: %s.", peer, error)

    def _wait_for_leader(self, connector: Connector) -> Connection:
        """Tries to connect until a leader answers; logs that it waits at growing intervals, sooner for a new reason."""
        next_log = interval = _FIRST_LOG
        last_log, announced = 0.0, ""
        start = time.monotonic()
        while True:
            waited = time.monotonic() - start
            problem = connector.last_problem
            if problem and without_numbers(problem) != announced:
                next_log = min(next_log, last_log + _FIRST_LOG)
            if waited >= next_log:
                self.announce(problem)
                announced = without_numbers(problem)
                interval = min(2 * interval, _LONGEST_LOG)
                last_log, next_log = waited, waited + interval
            connection = connector.connect(CONTROL)
            if connection is not None:
                return connection
            time.sleep(_RETRY_INTERVAL)

    def _accept(self, connector: Connector, control: Connection, offer: Offer) -> dict[FileKey, Path]:
        """Searches for the files of the offer, copies those that are missing, and answers whether all are here."""
        if offer.model != self._model:
            self._model = offer.model
            logger.info("The leader at %s serves %s.", self._endpoint, offer.model)
        own: dict[FileKey, Path] = {}
        try:
            self._check_offer(offer)
            with _ProgressReports(control) as reports:
                for wanted in offer.files:
                    place = self._place_of(wanted, offer, connector, reports)
                    if place is not None:
                        own |= dict.fromkeys(wanted.file_keys(), place)
        except RestartError:
            control.send(Kind.RESTART, timeout=_ANSWER_TIMEOUT)
            raise
        except RefusedError as error:
            control.send(Kind.FAILURE, to_json(Reason(str(error))), timeout=_ANSWER_TIMEOUT)
            raise
        control.send(Kind.ACCEPTANCE, timeout=_ANSWER_TIMEOUT)
        return own

    def _place_of(
        self, wanted: LoadedFiles, offer: Offer, connector: Connector, reports: _ProgressReports
    ) -> Path | None:
        """Where a file or folder of the offer is on this machine, once it is there; None if it need not be."""
        reports.set(f"reading the {wanted.what}")
        copies = offer.sends_files and may_be_copied(wanted)
        try:
            return find_own(wanted, reports.set, mapping=self._config.mapped_folders, download=not copies)
        except RefusedError as refusal:
            if not wanted.required:
                return None
            if not copies:
                raise
            logger.info("%s: the leader sends it.", upper_first(str(refusal).partition(";")[0]))
        with CopyDisplay("Copying from the leader") as display:

            def report(state: CopyState) -> None:
                display.show(state)
                reports.set(f"copying the {state.what}", state)

            return fetch_from_leader(wanted, connector, self._config, report)


class _ProgressReports:
    """Sends PROGRESS messages to the leader while its context is open, from a thread of its own.

    Args:
        control: the connection, which that thread alone uses meanwhile.
    """

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._progress = Progress("reading files")
        self._changed = threading.Event()
        self._done = False
        self._thread = threading.Thread(target=self._send, name="spark-progress", daemon=True)

    def __enter__(self) -> _ProgressReports:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done = True
        self._changed.set()
        self._thread.join(2 * _ANSWER_TIMEOUT)

    def set(self, activity: str, copy: CopyState | None = None) -> None:
        """Sets what is sent: the state of a copy at once, the rest with the next message."""
        if activity.startswith("downloading"):
            logger.info("%s.", upper_first(activity))
        self._progress = Progress(activity, copy)
        if copy is not None:
            self._changed.set()

    def _send(self) -> None:
        while True:
            self._changed.wait(PROGRESS_INTERVAL)
            self._changed.clear()
            if self._done:
                return
            try:
                self._control.send(Kind.PROGRESS, to_json(self._progress), timeout=_ANSWER_TIMEOUT)
            except PeerLostError:
                return  # sending the answer raises the same error
