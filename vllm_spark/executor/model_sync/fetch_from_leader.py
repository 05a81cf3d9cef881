"""Copies what a leader has to its follower's machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from vllm_spark.config.settings import SparkConfig
from vllm_spark.executor.handshake.client import Connector
from vllm_spark.executor.handshake.messages import CopyState
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_files.own import find_own
from vllm_spark.executor.model_sync.receiver import (
    ProcessStream,
    Stream,
    ThreadStream,
    ask_for_list,
    copy_files,
    start_all,
)
from vllm_spark.executor.model_sync.stream import StreamSettings, connect_copy


def may_be_copied(wanted: LoadedFiles) -> bool:
    """Whether it is files of the leader's: weights in object storage are read from there by both."""
    return wanted.origin != "object storage"


def fetch_from_leader(
    wanted: LoadedFiles, connector: Connector, config: SparkConfig, report: Callable[[CopyState], None]
) -> Path:
    """Copies what this machine lacks of `wanted`; returns the folder or file of this machine that holds it then.

    Args:
        wanted: what the leader has.
        connector: of a session that the leader has accepted.
        config: this follower's settings.
        report: called with the state once a second.

    Raises:
        RefusedError: it cannot be copied; the sentence says why, and what to do.
        PeerLostError: the leader was lost. What has arrived is not copied again.
    """
    connection = connect_copy(connector)
    try:
        manifest = ask_for_list(connection, wanted)
    finally:
        connection.close()
    copy_files(wanted, manifest, config.mapped_folders, partial(_open_streams, connector, config), report)
    return find_own(wanted, mapping=config.mapped_folders, download=False)


def _open_streams(connector: Connector, config: SparkConfig, count: int, lock: int) -> list[Stream]:
    if count == 1:  # little to copy: a process would take longer to start
        return [ThreadStream(connect_copy(connector))]
    settings = StreamSettings(config.model_dump_json(), connector.host, connector.port, connector.session)
    return start_all([partial(ProcessStream, settings, lock)] * count)
