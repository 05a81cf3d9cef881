"""What a message from leader to follower costs: our TLS connection and ZeroMQ with CURVE, and both unencrypted.

    python -m benchmarks.channel [--messages 3000] [--json FILE]

Two processes on one machine over 127.0.0.1, one message of a decode step's size (600 bytes; 8,800 for a batch of 128)
at a time, a pause between them as between decode steps. Reported: how long the sender is busy, and how long after the
send began the receiver has the message (CLOCK_MONOTONIC is one clock for both). The candidates take turns in every
round, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import socket
import ssl
import statistics
import struct
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_spark.bench.statistics import machine, percentile
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import Connection, Kind
from vllm_spark.executor.channel.tls import TlsConnection

SIZES = (600, 8800)
PAUSE = 0.002  # seconds between two messages: the receiver is asleep when the next one comes
STAMP = struct.Struct("<d")
SECRET = b"benchmark secret, 32 bytes long.."

Send = Callable[[bytes], None]
Receive = Callable[[], bytes]


def open_tls(port: int | None, encrypted: bool = True) -> tuple[Any, Any]:
    """Leader (`port` None): returns a listening socket's port and a function that accepts. Follower: connects."""
    if port is None:
        listening = socket.create_server(("127.0.0.1", 0))

        def accept() -> Any:
            plain, _ = listening.accept()
            context = tls_context(SECRET, "leader")
            return TlsConnection(plain, context, server_side=True, timeout=5) if encrypted else plain

        return listening.getsockname()[1], accept
    plain = socket.create_connection(("127.0.0.1", port))
    context = tls_context(SECRET, "follower")
    return None, lambda: TlsConnection(plain, context, server_side=False, timeout=5) if encrypted else plain


def connection(connection: TlsConnection) -> tuple[Send, Receive]:
    opened = Connection(connection, "peer", 1 << 26)
    return (lambda data: opened.send(Kind.CALL, data)), (lambda: opened.receive().payload)


def plain_socket(connection: socket.socket) -> tuple[Send, Receive]:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    file = connection.makefile("rb")

    def receive() -> bytes:
        return file.read(struct.unpack("<I", file.read(4))[0])

    return (lambda data: connection.sendall(struct.pack("<I", len(data)) + data)), receive


def zeromq(role: str, port: int | None, keys: tuple[tuple[bytes, bytes], tuple[bytes, bytes]] | None) -> Any:
    import zmq

    made = zmq.Context().socket(zmq.PAIR)
    if keys is not None:
        (leader_public, leader_secret), (follower_public, follower_secret) = keys
        if role == "leader":
            made.curve_server, made.curve_publickey, made.curve_secretkey = True, leader_public, leader_secret
        else:
            made.curve_publickey, made.curve_secretkey = follower_public, follower_secret
            made.curve_serverkey = leader_public
    if role == "leader":
        return made, made.bind_to_random_port("tcp://127.0.0.1")
    made.connect(f"tcp://127.0.0.1:{port}")
    return made, port


CANDIDATES = ("TLS connection (ours)", "ZeroMQ CURVE", "plain socket", "ZeroMQ plain")


def follower(ports: dict[str, int], keys: Any, messages: int, results: Any) -> None:
    receivers: dict[str, Receive] = {}
    for name in CANDIDATES:
        if name.startswith("ZeroMQ"):
            made, _ = zeromq("follower", ports[name], keys if "CURVE" in name else None)
            made.send(b"hello")
            receivers[name] = made.recv
        else:
            _, connect = open_tls(ports[name], "TLS" in name)
            receivers[name] = (connection if "TLS" in name else plain_socket)(connect())[1]
    lags: dict[str, list[float]] = {f"{name} {size}": [] for name in CANDIDATES for size in SIZES}
    for size in SIZES:
        for _ in range(messages):
            for name in CANDIDATES:
                data = receivers[name]()
                now = time.monotonic()
                lags[f"{name} {size}"].append(now - STAMP.unpack_from(data)[0])
    results.send(lags)


def run(messages: int) -> dict[str, Any]:
    import zmq

    keys = (zmq.curve_keypair(), zmq.curve_keypair())
    ports: dict[str, int] = {}
    openers: dict[str, Any] = {}
    for name in CANDIDATES:
        if name.startswith("ZeroMQ"):
            openers[name], ports[name] = zeromq("leader", None, keys if "CURVE" in name else None)
        else:
            ports[name], openers[name] = open_tls(None, "TLS" in name)
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=follower, args=(ports, keys, messages, theirs))
    process.start()
    senders: dict[str, Send] = {}
    for name in CANDIDATES:
        if name.startswith("ZeroMQ"):
            openers[name].recv()
            senders[name] = openers[name].send
        else:
            senders[name] = (connection if "TLS" in name else plain_socket)(openers[name]())[0]
    busy: dict[str, list[float]] = {f"{name} {size}": [] for name in CANDIDATES for size in SIZES}
    for size in SIZES:
        body = bytes(size - STAMP.size)
        for _ in range(messages):
            for name in CANDIDATES:
                time.sleep(PAUSE)
                start = time.monotonic()
                senders[name](STAMP.pack(start) + body)
                busy[f"{name} {size}"].append(time.monotonic() - start)
    lags = mine.recv()
    process.join(10)
    rows = []
    for size in SIZES:
        for name in CANDIDATES:
            key = f"{name} {size}"
            rows.append(
                {
                    "candidate": name,
                    "bytes": size,
                    "send_median_us": statistics.median(busy[key]) * 1e6,
                    "lag_median_us": statistics.median(lags[key]) * 1e6,
                    "lag_p99_us": percentile(lags[key], 0.99) * 1e6,
                    "lag_ratio": statistics.median(lags[key]) / statistics.median(lags[f"{CANDIDATES[1]} {size}"]),
                }
            )
    where = machine(f"Python {platform.python_version()}", ssl.OPENSSL_VERSION)
    return {"machine": where, "zeromq": zmq.zmq_version(), "messages": messages, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1000)
    parser.add_argument("--json")
    args = parser.parse_args()
    result = run(args.messages)
    table = Table(title=f"One message, leader to follower ({result['machine']}, ZeroMQ {result['zeromq']})")
    for column in ("candidate", "bytes", "send busy, median us", "lag, median us", "lag, p99 us", "lag / CURVE's"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for row in result["rows"]:
        numbers = [f"{row[key]:.1f}" for key in ("send_median_us", "lag_median_us", "lag_p99_us")]
        table.add_row(row["candidate"], str(row["bytes"]), *numbers, f"{row['lag_ratio']:.2f}")
    Console(width=120).print(table)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
