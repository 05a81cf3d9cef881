"""An end of a rail, made with pyverbs and nothing of vllm_spark: what it and our transport agree on, verbs say.

    with Device("rxe0") as device:
        region = Region(device, 4096)
        pair = QueuePair(device, "10.0.0.1")
        send_to_the_other_side(pair.identity(region))
        pair.connect(identity_of_the_other_side)
        region.memory[:5] = b"hello"
        pair.write(region, length=5)
        pair.wait(timeout=30)

Runs under Debian's own /usr/bin/python3, for which its package python3-pyverbs was built.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import TracebackType

from pyverbs import enums
from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

PORT = 1
QUEUE_DEPTH = 64
MAX_GIDS = 1024
RETRY_TIMEOUT = 17
"""4.096 microseconds times 2 to the power of this: 0.54 s until something unanswered is sent again.

A busy host stops an emulated machine for nearly as long."""
RETRIES = 6
"""7 would be without end for soft-RoCE."""


class PeerError(Exception):
    """The device does not have or do what was asked."""


@dataclass(frozen=True)
class Identity:
    """What the other side must know of a queue pair and a region to write there. Plain values, for any channel."""

    queue_pair: int
    packet_number: int
    gid: str
    address: int
    key: int
    length: int
    mtu: int
    """As verbs count it: 1 is 256 bytes, 5 is 4096."""


class Device:
    """An open RDMA device with a protection domain.

    Raises:
        PeerError: there is no such device, or it does not open.
    """

    def __init__(self, name: str) -> None:
        try:
            self.context = Context(name=name)
        except Exception as error:  # pyverbs has a dozen kinds
            raise PeerError(f"the RDMA device {name!r} does not open: {error}") from error
        self.name = name
        self.domain = PD(self.context)

    @property
    def active(self) -> bool:
        """Whether its port has a link."""
        return bool(self.context.query_port(PORT).state == enums.IBV_PORT_ACTIVE)

    @property
    def mtu(self) -> int:
        """The port's MTU, as verbs count it."""
        return int(self.context.query_port(PORT).active_mtu)

    def gid_index(self, address: str) -> int:
        """Where the RoCE v2 GID of an IP address stands in the port's table.

        Raises:
            PeerError: it is not there.
        """
        wanted = gid_of(address)
        for entry in self.context.query_gid_table(MAX_GIDS):
            is_v2 = entry.port_num == PORT and entry.gid_type == enums.IBV_GID_TYPE_ROCE_V2
            if is_v2 and IPv6Address(self.context.query_gid(PORT, entry.gid_index).gid.strip()) == wanted:
                return int(entry.gid_index)
        raise PeerError(f"port {PORT} of {self.name} has no RoCE v2 GID for {address}")

    def close(self) -> None:
        """Closes it, and first all that was made of it."""
        self.context.close()

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Region:
    """Zeroed memory of `length` bytes that the other side may write, and read if `readable`."""

    def __init__(self, device: Device, length: int, readable: bool = False) -> None:
        self.length = length
        self.memory = mmap.mmap(-1, length)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        access = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
        if readable:
            access |= enums.IBV_ACCESS_REMOTE_READ
        self.registration = MR(device.domain, length, access, address=self.address)


class QueuePair:
    """A reliable connected queue pair of the device's port, that speaks from the IP address `address`.

    Raises:
        PeerError: the port has no RoCE v2 GID for the address.
    """

    def __init__(self, device: Device, address: str) -> None:
        self._device = device
        self._address = address
        self._gid_index = device.gid_index(address)
        self._packet_number = random.getrandbits(24)
        self.completions = CQ(device.context, QUEUE_DEPTH)
        room = QPCap(max_send_wr=QUEUE_DEPTH, max_recv_wr=QUEUE_DEPTH, max_send_sge=1, max_recv_sge=1)
        kind = QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=self.completions, rcq=self.completions, cap=room, sq_sig_all=0)
        self.queue_pair = QP(device.domain, kind)
        self._other: Identity | None = None
        self._posted = 0

    def identity(self, region: Region) -> Identity:
        """What the other side must be told before it can `connect` and write to `region`."""
        return Identity(
            queue_pair=self.queue_pair.qp_num,
            packet_number=self._packet_number,
            gid=str(gid_of(self._address)),
            address=region.address,
            key=region.registration.rkey,
            length=region.length,
            mtu=self._device.mtu,
        )

    def connect(self, other: Identity) -> None:
        """Makes it ready to receive from the other side and to send there."""
        self._other = other
        attributes = QPAttr(port_num=PORT)
        attributes.qp_access_flags = enums.IBV_ACCESS_REMOTE_WRITE | enums.IBV_ACCESS_REMOTE_READ
        self.queue_pair.to_init(attributes)

        route = GlobalRoute(dgid=GID(IPv6Address(other.gid).exploded), sgid_index=self._gid_index)
        attributes = QPAttr(port_num=PORT)
        attributes.ah_attr = AHAttr(gr=route, is_global=1, port_num=PORT)
        attributes.dest_qp_num = other.queue_pair
        attributes.rq_psn = other.packet_number
        attributes.path_mtu = min(self._device.mtu, other.mtu)
        attributes.max_dest_rd_atomic = 1
        attributes.min_rnr_timer = 12
        self.queue_pair.to_rtr(attributes)

        attributes.sq_psn = self._packet_number
        attributes.timeout = RETRY_TIMEOUT
        attributes.retry_cnt = RETRIES
        attributes.rnr_retry = 7
        attributes.max_rd_atomic = 1
        self.queue_pair.to_rts(attributes)

    def write(
        self, region: Region, length: int, offset: int = 0, remote_offset: int = 0, signalled: bool = True
    ) -> int:
        """Posts an RDMA write from `region` to the other side's; returns the work request's number.

        The bytes go into the other side's memory, which it can only see by looking there.
        """
        assert self._other is not None, "connect it first"
        self._posted += 1
        request = SendWR(
            wr_id=self._posted,
            opcode=enums.IBV_WR_RDMA_WRITE,
            num_sge=1,
            sg=[SGE(region.address + offset, length, region.registration.lkey)],
            send_flags=enums.IBV_SEND_SIGNALED if signalled else 0,
        )
        request.set_wr_rdma(self._other.key, self._other.address + remote_offset)
        self.queue_pair.post_send(request)
        return self._posted

    def wait(self, timeout: float, count: int = 1) -> list[int]:
        """Waits at most `timeout` seconds for `count` completions; returns their work requests' numbers, in order.

        Raises:
            PeerError: one of them is an error, or they did not come in time.
        """
        done: list[int] = []
        deadline = time.monotonic() + timeout
        while len(done) < count:
            for completion in self.completions.poll(count - len(done))[1]:
                if completion.status != enums.IBV_WC_SUCCESS:
                    raise PeerError(f"work request {completion.wr_id} ended with status {completion.status}")
                done.append(completion.wr_id)
            if len(done) < count and time.monotonic() > deadline:
                raise PeerError(f"{len(done)} of {count} completions came in {timeout:g} s")
            time.sleep(0)  # soft-RoCE's own work needs the processor
        return done


def gid_of(address: str) -> IPv6Address:
    """The GID of an IP address: itself, or mapped as RFC 4291 says if it is an IPv4 address."""
    parsed = ip_address(address)
    return IPv6Address(f"::ffff:{parsed}") if isinstance(parsed, IPv4Address) else parsed
