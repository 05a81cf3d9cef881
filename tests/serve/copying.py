"""Leader and follower as far as they copy a model, without vLLM: programs for tests and for benchmarks/model_sync.py.

    python -m tests.serve.copying leader --address A --port P FOLDER      # offers FOLDER, until it is stopped
    python -m tests.serve.copying follower --leader A --port P            # copies it; prints `seconds:` and `place:`

Both read the secret from VLLMSPARK_SECRET. The follower's settings are those of `vllm-spark join`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from vllm_spark.backend.logging import log_as
from vllm_spark.config.settings import SparkConfig, add_flags, given_flags
from vllm_spark.errors import SparkError
from vllm_spark.executor.handshake.client import Connector, make_connector
from vllm_spark.executor.handshake.leader_search import LeaderSearch
from vllm_spark.executor.handshake.messages import GROUPS, RPC, Offer
from vllm_spark.executor.handshake.server import listener_at
from vllm_spark.executor.model_files.comparison import ModelIdentity
from vllm_spark.executor.model_files.hub_cache import hub_place_of
from vllm_spark.executor.model_files.loaded import LoadedFiles
from vllm_spark.executor.model_sync import staging
from vllm_spark.executor.model_sync.sender import ModelSender


def lead(config: SparkConfig, folder: Path) -> None:
    """Waits for one follower after the other, as leaders that are started again do."""
    assert config.address is not None
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *given: stopped.set())
    hub = hub_place_of(folder)
    here = LoadedFiles(
        "model", str(folder), str(folder), "model", ModelIdentity.of(folder), "path" if hub is None else "hub", hub
    )
    sender = ModelSender()
    sender.offer([here])
    # A machine of its own would not have the leader's path.
    offer = Offer(str(folder), [replace(here, place="/of/the/leader")], 5.0, sends_files=True)
    listener = listener_at(config.address, config, serve_copy=sender.serve)
    print(f"offers: {sum(file.stat().st_size for file in folder.iterdir() if file.is_file())}", flush=True)
    try:
        follower = listener.wait_for_follower(offer, config.join_timeout, sender.changed)
        print(f"accepted: {follower.name}; sent: {sender.sent}", flush=True)
        stopped.wait()
    finally:
        listener.close()
        sender.close()


def follow(config: SparkConfig) -> None:
    """Copies what the leader offers."""
    assert config.leader is not None

    def connect() -> Connector:
        return make_connector(config, str(config.leader), config.port)

    search = LeaderSearch(config, connect, lambda *given: None, lambda environment: None, once=True)
    start = time.perf_counter()
    found = search.find()
    seconds = time.perf_counter() - start
    connections = [found.connector.connect(name) for name in (RPC, GROUPS)]
    (place,) = set(found.own.values())
    print(f"seconds: {seconds:.3f}\nplace: {place}", flush=True)
    assert all(connections)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--range-bytes", type=int, default=staging.RANGE_BYTES)
    roles = parser.add_subparsers(dest="role", required=True)
    leader = roles.add_parser("leader")
    leader.add_argument("folder", type=Path)
    add_flags(leader, ["leader", "both"], prefix="--")
    add_flags(roles.add_parser("follower"), ["follower", "both"], prefix="--")
    args = parser.parse_args()
    log_as(args.role)
    staging.RANGE_BYTES = args.range_bytes
    config = SparkConfig.resolve(flags=given_flags(args))
    try:
        if args.role == "leader":
            lead(config, args.folder)
        else:
            follow(config)
    except SparkError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
