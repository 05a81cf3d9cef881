"""What the follower compares with the leader's files while the pair serves: adapters, and weights to load again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from vllm_spark.errors import RefusedError, SparkError
from vllm_spark.executor.channel.addresses import host_name
from vllm_spark.executor.model_files.comparison import Signature, signature_of
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import find_own


class _Own(NamedTuple):
    """Where this machine has something, and what must be in it."""

    place: Path
    signature: Signature
    wanted: LoadedFiles


class ComparedFiles:
    """This machine's folders with the content of the leader's, by the leader's places.

    Args:
        find: finds the folder of this machine that holds what the leader has; raises SparkError if there is none.
    """

    def __init__(self, find: Callable[[LoadedFiles], Path] = find_own) -> None:
        self._find = find
        self._own: dict[str, _Own] = {}

    def compare(self, wanted: LoadedFiles) -> str | None:
        """Looks for what the leader has; None if it is here, else the sentence why not."""
        try:
            place = self._find(wanted)
        except SparkError as error:
            return str(error)
        # Taken before the last look at the content, which reads only what has changed meanwhile.
        signature = signature_of(place)
        try:
            difference = wanted.identity_at(place).difference(wanted.identity, f"on {host_name()}")
        except RefusedError as error:
            return str(error)
        if difference:
            return f"it was changed while it was compared: {difference} ({place}); load it again once it is complete"
        self._own[wanted.place] = _Own(place, signature, wanted)
        return None

    def place(self, leaders: str, what: str) -> Path:
        """The folder of this machine.

        Args:
            leaders: the leader's folder.
            what: how the message calls it.

        Raises:
            SparkError: it was not compared.
        """
        if leaders not in self._own:
            raise SparkError(f"the {what} was not compared before it is loaded; report this")
        return self._own[leaders].place

    def verify(self, leaders: str) -> None:
        """Looks whether the folder still has what was compared, since a worker is about to read it.

        Raises:
            SparkError: it has another content.
        """
        own = self._own[leaders]
        if (signature := signature_of(own.place)) == own.signature:
            return
        mine = own.wanted.identity_at(own.place)
        if difference := mine.difference(own.wanted.identity, f"on {host_name()}"):
            raise SparkError(
                f"the {own.wanted.what} was changed while the pair serves: {difference} ({own.place}); "
                "load what has changed from a new folder on both machines"
            )
        self._own[leaders] = own._replace(signature=signature)
