"""A machine's end of one rail: its cable, interface and RDMA device, and what can be done to them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .errors import MachineError

if TYPE_CHECKING:
    from .machine import Machine

RAILS = 2
MTU = 9000
"""Of the interface, in bytes; the RDMA device then has 4096, the most there is."""
COMMAND_SECONDS = 120.0
CARRIER_SECONDS = 60.0
POLL_SECONDS = 0.2


class Rail:
    """End `machine` of rail `number`."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.number = number
        self.interface = f"eth{number}"
        self.device = f"rxe{number}"
        self.address = f"10.0.{number}.{machine.index + 1}"
        self._machine = machine

    def __str__(self) -> str:
        return f"rail {self.number} of {self._machine.name}"

    def unplug(self) -> None:
        """Pulls the cable at this end: this machine loses the carrier, the other one is told nothing.

        A cable that is cut for both is pulled at both ends.
        """
        self._cable(plugged=False)
        self._wait_for_carrier("0")

    def plug(self) -> None:
        """Puts the cable back, and waits until the interface has its carrier."""
        self._cable(plugged=True)
        self._wait_for_carrier("1")

    def down(self) -> None:
        """Takes the interface down, as an administrator would."""
        self._ip("link", "set", self.interface, "down")

    def up(self) -> None:
        """Brings the interface back, with its address."""
        self._ip("link", "set", self.interface, "up")
        self._ip("address", "replace", f"{self.address}/24", "dev", self.interface)

    def impair(self, *netem: str) -> None:
        """Mistreats what this end sends, in the words of tc-netem(8): `rail.impair("loss", "5%", "delay", "20ms")`.

        It replaces what was said before.
        """
        self._run("tc", "qdisc", "replace", "dev", self.interface, "root", "netem", *netem)

    def lose(self, over: int = 0) -> None:
        """Loses IP packets of more than `over` bytes, Ethernet header included, that this end sends.

        The carrier stays, and ARP gets through: connections are still made over it.
        """
        self._run("tc", "qdisc", "replace", "dev", self.interface, "root", "handle", "1:", "prio")
        condition = ("basic", "match", f"meta(pkt_len gt {over})")
        self._run(
            *("tc", "filter", "replace", "dev", self.interface, "parent", "1:", "protocol", "ip", "prio", "1"),
            *(*condition, "action", "drop"),
        )

    def answer_no_arp(self) -> None:
        """Lets nobody find this end's address: whoever does not know it yet cannot connect to it."""
        self._ip("link", "set", self.interface, "arp", "off")

    def forget_neighbours(self) -> None:
        """Lets this end look for the other end's address again."""
        self._ip("neighbour", "flush", "dev", self.interface)

    def unimpair(self) -> None:
        """Ends what `impair`, `lose` and `answer_no_arp` did."""
        if "NOARP" in self._run("ip", "link", "show", "dev", self.interface):
            # Not otherwise: it makes the interface forget its neighbours, and the first packets get lost.
            self._ip("link", "set", self.interface, "arp", "on")
        shown = self._run("tc", "qdisc", "show", "dev", self.interface)
        if "netem" in shown or "prio " in shown:
            self._run("tc", "qdisc", "delete", "dev", self.interface, "root")

    def heal(self) -> None:
        """Undoes everything that the methods above can do, in whatever order they were called."""
        self._cable(plugged=True)
        self.unimpair()
        self.up()
        self._wait_for_carrier("1")

    def make(self) -> None:
        """Sets up interface and device after a boot."""
        self._ip("link", "set", self.interface, "mtu", str(MTU))
        self.up()
        self._run("rdma", "link", "add", self.device, "type", "rxe", "netdev", self.interface)

    def qemu_options(self) -> tuple[str, ...]:
        """The network card and its end of the cable: a pair of datagram sockets, named after rail and machine."""
        here, there = (f"rail{self.number}-{index}" for index in (self._machine.index, 1 - self._machine.index))
        cable = f"cable{self.number}"
        ends = f"local.type=unix,local.path={here},remote.type=unix,remote.path={there}"
        card = f"id={self._card},mac=52:54:00:00:{self.number:02x}:{self._machine.index + 1:02x},host_mtu={MTU}"
        return (
            *("-netdev", f"dgram,id={cable},{ends}"),
            *("-device", f"virtio-net-pci,netdev={cable},{card},romfile="),
        )

    @property
    def _card(self) -> str:
        return f"card{self.number}"

    def _cable(self, plugged: bool) -> None:
        self._machine.monitor.execute("set_link", name=self._card, up=plugged)

    def _wait_for_carrier(self, wanted: str) -> None:
        deadline = time.monotonic() + CARRIER_SECONDS
        # An interface that is down knows of no carrier, so there is nothing to wait for.
        question = f"cat /sys/class/net/{self.interface}/carrier 2>/dev/null || echo unknown"
        while self._run("sh", "-c", question).strip() not in (wanted, "unknown"):
            if time.monotonic() > deadline:
                raise MachineError(f"the carrier of {self} is not {wanted} after {CARRIER_SECONDS:g} s")
            time.sleep(POLL_SECONDS)

    def _ip(self, *words: str) -> None:
        self._run("ip", *words)

    def _run(self, *argv: str) -> str:
        return self._machine.run(argv, timeout=COMMAND_SECONDS).stdout
