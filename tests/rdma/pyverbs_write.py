"""Writes a greeting into the other machine's memory and waits for its own: one rail, pyverbs on both ends.

    /usr/bin/python3 pyverbs_write.py rxe0 10.0.0.1 10.0.0.2

The two addresses are this end's and the other's; the end with the smaller one listens. Prints what it received.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import asdict
from ipaddress import ip_address
from typing import Any

from pyverbs_peer import Device, Identity, QueuePair, Region

EXCHANGE_PORT = 7471
BOUND = 120.0
"""Seconds for each wait: an emulated machine may be slow to start."""
LENGTH = 64
OUTGOING = 4096


def main(device_name: str, own: str, other: str) -> None:
    with Device(device_name) as device, meet(own, other) as channel:
        region = Region(device, 2 * OUTGOING)
        pair = QueuePair(device, own)
        pair.connect(Identity(**swap(channel, asdict(pair.identity(region)))))
        swap(channel, "ready to receive")

        greeting = f"from {own} over {device_name}".encode().ljust(LENGTH)
        region.memory[OUTGOING : OUTGOING + LENGTH] = greeting
        pair.write(region, LENGTH, offset=OUTGOING)
        pair.wait(BOUND)

        # Bytes of one write appear in order; its last byte says that all are there.
        wait_until_written(region)
        print(region.memory[:LENGTH].decode().strip())
        swap(channel, "received")


def wait_until_written(region: Region) -> None:
    deadline = time.monotonic() + BOUND
    while region.memory[LENGTH - 1] == 0:
        if time.monotonic() > deadline:
            sys.exit(f"nothing was written here in {BOUND:g} s")
        time.sleep(0)


def meet(own: str, other: str) -> socket.socket:
    """A TCP connection to the other end."""
    if int(ip_address(own)) < int(ip_address(other)):
        with socket.create_server((own, EXCHANGE_PORT)) as listener:
            listener.settimeout(BOUND)
            channel, _ = listener.accept()
    else:
        deadline = time.monotonic() + BOUND
        while True:
            try:
                channel = socket.create_connection((other, EXCHANGE_PORT), timeout=BOUND)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
    channel.settimeout(BOUND)
    return channel


def swap(channel: socket.socket, mine: object) -> Any:
    """Sends a value and returns the other end's."""
    channel.sendall(json.dumps(mine).encode() + b"\n")
    received = b""
    while not received.endswith(b"\n"):
        if not (byte := channel.recv(1)):
            sys.exit("the other end is gone")
        received += byte
    return json.loads(received)


if __name__ == "__main__":
    main(*sys.argv[1:])
