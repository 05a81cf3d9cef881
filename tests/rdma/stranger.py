"""Rank 1 of our protocol, written with pyverbs and docs/protocol.md alone: nothing of vllm_spark is imported.

    /usr/bin/python3 stranger.py HOST PORT OPERATIONS [attack...]

It speaks with rank 0, which runs tests/rdma/host_of_stranger.py, over one rail. After its operations it tries each
attack (`wrong-key`, `outside`, `stale-key`), prints what its NIC says of it, lets the rail be connected anew, and shows
by more operations that rank 0 is unharmed.
"""

from __future__ import annotations

import base64
import json
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv6Address
from typing import TypedDict

from pyverbs_peer import Device, Identity, PeerError, QueuePair, Region

BOUND = 120.0
EXCHANGE, ANNOUNCEMENT = 1, 2
HEADER = struct.Struct("<BxxxI")
RAIL = struct.Struct("<6IQ16s")
STATE_HEAD, REASON, MAX_RAILS = struct.Struct("<QII"), 2048, 4
OFFERED, READY, PROVEN = 1, 2, 4
PAGE, PIECES, FLAG = 4096, 64, 128
ALL_REDUCE, FLOAT32 = 1, 1


class Address(TypedDict):
    """An address of a port, as the exchange has it."""

    gid: str
    network: str


class Port(TypedDict):
    """An RDMA port, as the exchange has it."""

    device: str
    number: int
    mtu: int
    addresses: list[Address]


class Message(TypedDict, total=False):
    """What is read and written here of the messages of the exchange; each has some of these fields."""

    rank: int
    description: str
    agreement: dict[str, str]
    ports: list[Port]
    offer: str
    problem: str


def checksum(data: bytes) -> int:
    """FNV-1a."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


class Channel:
    """The TCP connection to rank 0."""

    def __init__(self, host: str, port: int) -> None:
        deadline = time.monotonic() + BOUND
        while True:
            try:
                self._socket = socket.create_connection((host, port), timeout=2)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        self._socket.settimeout(BOUND)
        self.announcements: list[bytes] = []

    def send(self, kind: int, payload: bytes) -> None:
        self._socket.sendall(HEADER.pack(kind, len(payload)) + payload)

    def receive(self, wanted: int) -> bytes:
        """The next frame of that kind; of announcements the newest is kept."""
        while True:
            kind, length = HEADER.unpack(self._read(HEADER.size))
            payload = self._read(length)
            if kind == wanted:
                return payload

    def exchange(self) -> Message:
        message: Message = json.loads(self.receive(EXCHANGE))
        return message

    def answer(self, message: Message) -> None:
        self.send(EXCHANGE, json.dumps(message).encode())

    def _read(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self._socket.recv(length - len(data))
            if not part:
                sys.exit("rank 0 closed the connection")
            data += part
        return data


class Layout:
    """Where things lie in the receiving part of a region."""

    def __init__(self, agreement: dict[str, str]) -> None:
        self.slots = 2 * int(agreement["depth"])
        self.packet_bytes = int(agreement["packet_bytes"])
        packets = 1 + -(-self.packet_bytes // 8)
        self.packet_area = -(-packets * 16 // FLAG) * FLAG
        self.payload_area = -(-int(agreement["slot_bytes"]) // PAGE) * PAGE
        self.flags = PAGE
        self.packets = self.flags + self.slots * PIECES * FLAG
        self.payload = self.packets + -(-self.slots * self.packet_area // PAGE) * PAGE
        self.total = self.payload + self.slots * self.payload_area

    def flag_at(self, sequence: int) -> int:
        return self.flags + sequence % self.slots * PIECES * FLAG

    def packets_at(self, sequence: int) -> int:
        return self.packets + sequence % self.slots * self.packet_area

    def payload_at(self, sequence: int) -> int:
        return self.payload + sequence % self.slots * self.payload_area


class Stranger:
    """Rank 1."""

    def __init__(self, channel: Channel, device: Device, own_address: str) -> None:
        self._channel, self._device, self._own = channel, device, own_address
        self.sequence = 0
        self._version = 0
        terms = channel.exchange()
        self._agreement = terms["agreement"]
        channel.answer({**terms, "rank": 1, "description": "a stranger"})
        self.layout = Layout(self._agreement)
        ports = channel.exchange()["ports"]
        address: Address = {
            "gid": base64.b64encode(self._gid()).decode(),
            "network": ports[0]["addresses"][0]["network"],
        }
        port: Port = {"device": device.name, "number": 1, "mtu": 4096, "addresses": [address]}
        channel.answer({"ports": [port], "problem": ""})
        # What is received at the start, what is sent behind it.
        self._region = Region(device, 2 * self.layout.total)
        offer = channel.exchange()
        self._epoch = 1
        self._pair = QueuePair(device, own_address)
        channel.answer({"offer": base64.b64encode(self._state(OFFERED)).decode(), "problem": ""})
        self._other = self._peer(base64.b64decode(offer["offer"]))[1]
        self._pair.connect(self._other)
        channel.exchange()
        channel.answer({"problem": ""})
        self._prove()

    def all_reduce(self, values: list[float]) -> list[float]:
        """One all-reduce of float32, as packets or as payload, by size."""
        self.sequence += 1
        data = struct.pack(f"<{len(values)}f", *values)
        tag = ALL_REDUCE << 30 | FLOAT32 << 27 | len(values)
        theirs = self._by_packets(data, tag) if len(data) <= self.layout.packet_bytes else self._by_payload(data, tag)
        return [mine + other for mine, other in zip(values, struct.unpack(f"<{len(values)}f", theirs), strict=True)]

    def attack(self, kind: str) -> str:
        """Writes where it must not, and returns what came of it."""
        other = self._other
        if kind == "wrong-key":
            other = replace(other, key=other.key ^ 0x55)
        elif kind == "stale-key":
            other = replace(other, key=self._stale_key)
        self._pair._other = other
        self._region.memory[self.layout.total : self.layout.total + 8] = b"\xff" * 8
        # The abort word and the doorbell lie just before the receiving part.
        where = -PAGE if kind == "outside" else self.layout.payload_at(0)
        self._pair.write(self._region, 8, offset=self.layout.total, remote_offset=where)
        try:
            self._pair.wait(BOUND)
        except PeerError as error:
            return str(error)
        return "it was written"

    def connect_anew(self) -> None:
        """As after every failure: another epoch, another queue pair, another key."""
        self._stale_key = self._other.key
        while True:
            epoch, other = self._peer(self._channel.receive(ANNOUNCEMENT))
            if epoch > self._epoch and other.queue_pair:
                break
        self._epoch, self._other = epoch, other
        self._pair = QueuePair(self._device, self._own)
        self._channel.send(ANNOUNCEMENT, self._state(OFFERED))
        self._pair.connect(other)
        self._channel.send(ANNOUNCEMENT, self._state(READY))
        while struct.unpack_from("<II", self._channel.receive(ANNOUNCEMENT), STATE_HEAD.size)[1] < READY:
            pass
        self._prove()

    def _prove(self) -> None:
        """Has an announcement of a whole page acknowledged, says so, and waits until rank 0 has done the same."""
        self._write(self._state(READY).ljust(PAGE, b"\0"), 0)
        self._channel.send(ANNOUNCEMENT, self._state(PROVEN))
        while True:
            epoch, phase = struct.unpack_from("<II", self._channel.receive(ANNOUNCEMENT), STATE_HEAD.size)
            if (epoch, phase) == (self._epoch, PROVEN):
                return

    def _by_packets(self, data: bytes, tag: int) -> bytes:
        words = [
            tag,
            len(data),
            *struct.unpack(f"<{-(-len(data) // 8) * 2}I", data.ljust(-(-len(data) // 8) * 8, b"\0")),
        ]
        packets = struct.pack(f"<{2 * len(words)}I", *(part for word in words for part in (word, self.sequence)))
        place = self.layout.packets_at(self.sequence)
        self._write(packets, place)
        end = place + len(packets)
        received: tuple[int, ...] = ()
        self._wait(
            lambda: set(struct.unpack(f"<{2 * len(words)}I", self._region.memory[place:end])[1::2]) == {self.sequence}
        )
        received = struct.unpack(f"<{2 * len(words)}I", self._region.memory[place:end])[::2]
        assert received[0] == tag, f"tag {received[0]:x} where {tag:x} was due"
        return struct.pack(f"<{len(received) - 2}I", *received[2:])[: len(data)]

    def _by_payload(self, data: bytes, tag: int) -> bytes:
        place, flag = self.layout.payload_at(self.sequence), self.layout.flag_at(self.sequence)
        self._write(data, place)
        self._write(struct.pack("<II", tag, self.sequence), flag)  # after it: writes of one connection keep their order
        self._wait(lambda: struct.unpack_from("<II", self._region.memory, flag) == (tag, self.sequence))
        return self._region.memory[place : place + len(data)]

    def _write(self, data: bytes, place: int) -> None:
        at = self.layout.total + place
        self._region.memory[at : at + len(data)] = data
        self._pair.write(self._region, len(data), offset=at, remote_offset=place)
        self._pair.wait(BOUND)

    def _wait(self, arrived: Callable[[], bool]) -> None:
        deadline = time.monotonic() + BOUND
        while not arrived():
            if time.monotonic() > deadline:
                sys.exit(f"message {self.sequence} did not come")
            time.sleep(0)

    def _state(self, phase: int) -> bytes:
        """This rank's announcement."""
        self._version += 1
        mine = self._pair.identity(self._region)
        rail = RAIL.pack(
            self._epoch, phase, mine.queue_pair, mine.packet_number, mine.key, 4096, mine.address, self._gid()
        )
        body = STATE_HEAD.pack(self._version, 1, 0) + rail.ljust(MAX_RAILS * RAIL.size, b"\0") + bytes(REASON)
        return body + struct.pack("<Q", checksum(body))

    def _peer(self, state: bytes) -> tuple[int, Identity]:
        """Epoch of rank 0's rail, and how it is reached."""
        body, (sum_,) = state[:-8], struct.unpack("<Q", state[-8:])
        assert checksum(body) == sum_, "the checksum is wrong"
        epoch, _, pair, number, key, _, address, gid = RAIL.unpack_from(state, STATE_HEAD.size)
        return epoch, Identity(pair, number, str(IPv6Address(gid)), address, key, self.layout.total, 5)

    def _gid(self) -> bytes:
        return IPv6Address(f"::ffff:{self._own}").packed


def run(stranger: Stranger, operations: int) -> None:
    """Sizes as host_of_stranger.py has them."""
    for operation in range(operations):
        size = 1 + operation * 977 % 3000
        values = [float(stranger.sequence + 1 + place % 7) for place in range(size)]
        total = stranger.all_reduce(values)
        wanted = [value + 0.5 * stranger.sequence for value in values]
        assert total == wanted, f"operation {operation} of {size} numbers"


def main(host: str, port: int, operations: int, attacks: list[str]) -> None:
    own = host.rsplit(".", 1)[0] + ".2"
    with Device("rxe0") as device:
        stranger = Stranger(Channel(host, port), device, own)
        run(stranger, operations)
        print(f"{operations} operations were right", flush=True)
        for attack in attacks:
            print(f"{attack}: {stranger.attack(attack)}", flush=True)
            stranger.connect_anew()
            run(stranger, 20)
            print(f"{attack}: 20 operations after it were right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
