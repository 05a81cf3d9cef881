"""Two hosts on one machine: network namespaces joined by a bridge, or two loopback addresses.

    root namespace      bridge 10.77.N.254 --+-- veth -- eth0 10.77.N.1  (host 0)
    (tests, clients)                         +-- veth -- eth0 10.77.N.2  (host 1)

Clients connect from the root namespace. Each host has a /dev/shm of its own: a folder in that of the root namespace.
Names carry the process id of the test session, so that sessions do not meet and the next one can delete what a killed
one has left.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal

import psutil

from vllm_spark.processes.managed import POLL_SECONDS, clean_environment

from .cgroups import MemoryCgroup
from .forked_process import ForkServer
from .process import Process, start

PREFIX = "vsp"
LEFTOVER = re.compile(rf"{PREFIX}(\d+)(h\d|r\d|b)")
SHARED_MEMORY = Path("/dev/shm")
WITH_OWN_SHARED_MEMORY = f'mount --bind "$0" {SHARED_MEMORY} && exec "$@"'
"""A shell command for `ip netns exec`, which gives every program a mount namespace of its own."""
CARRIER_SECONDS = 10.0
FREE_PORT = "import socket, sys; s = socket.socket(); s.bind((sys.argv[1], 0)); print(s.getsockname()[1])"


@dataclass
class Host:
    """One machine of the pair, as far as a network can tell."""

    index: int
    address: str
    interface: str
    logs: Path
    namespace: str | None = None
    outside: str | None = None
    """The bridge's end of this host's cable; None where hosts are only loopback addresses."""
    shared_memory: Path = SHARED_MEMORY
    """What programs of this host see as /dev/shm; where hosts are only loopback addresses, they share the machine's."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every program that `popen` starts, if it is not started with others."""
    clock: Path | None = None
    """The time namespace of programs that are started now; None for that of the tests."""
    cgroup: MemoryCgroup | None = None
    """In which programs of this host run that are started now; None for that of the tests."""
    _numbers: Iterator[int] = field(default_factory=lambda: count(1), repr=False)
    _given_ports: set[int] = field(default_factory=set, repr=False)
    _fork_server: ForkServer | None = field(default=None, repr=False)

    def popen(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, name: str = "", *, cold: bool = False
    ) -> Process:
        """Starts a program on this host, with `env` on top of a clean one and `environment`; its log is in `logs`.

        Args:
            argv: program and arguments.
            env: variables.
            name: its name in messages.
            cold: starts an interpreter of its own, which imports vLLM, where a fork server would do.
        """
        name = name or Path(argv[0]).name
        log = self.logs / f"host{self.index}-{next(self._numbers):02d}-{name.replace(' ', '-')}.log"
        name, environment = f"{name} on host {self.index}", clean_environment() | self.environment | dict(env or {})
        own = self.cgroup is not None or self.clock is not None
        server = None if cold or own else self._fork_server
        if server is not None and server.suits(argv, environment):
            return start(name, argv, log, environment, server)
        return start(name, self.command(argv), log, environment)

    @contextmanager
    def fork_server(self) -> Iterator[None]:
        """Meanwhile this host has a process that has imported vLLM, from which `popen` forks what it can."""
        self._fork_server = ForkServer(self.command([]), self.logs / f"host{self.index}-fork-server.log")
        try:
            yield
        finally:
            self._fork_server.close()
            self._fork_server = None

    def run(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on this host to its end and returns its output; raises nothing for its exit code."""
        return subprocess.run(
            self.command(argv),
            env=clean_environment() | dict(env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def free_port(self) -> int:
        """A TCP port that nothing listens on at this host's address now, and that was not given before."""
        while (port := int(self.run([sys.executable, "-c", FREE_PORT, self.address]).stdout)) in self._given_ports:
            pass
        self._given_ports.add(port)
        return port

    @contextmanager
    def within(self, cgroup: MemoryCgroup) -> Iterator[None]:
        """Meanwhile `popen` starts programs in a cgroup."""
        self.cgroup = cgroup
        try:
            yield
        finally:
            self.cgroup = None

    @contextmanager
    def clock_ahead(self, seconds: int) -> Iterator[None]:
        """Meanwhile `popen` starts programs whose monotonic clock is ahead of the tests', in a time namespace.

        With 0 seconds they have the tests' clock, for a machine that does not let us make one.
        """
        if seconds == 0:
            yield
            return
        argv = ["unshare", "--time", "--monotonic", str(seconds), "--fork", "--kill-child", "sleep", "infinity"]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True) as holder:
            try:
                self.clock = Path(f"/proc/{holder.pid}/ns/time_for_children")
                deadline = time.monotonic() + CARRIER_SECONDS
                while self.clock.readlink() == Path("/proc/self/ns/time_for_children").readlink():
                    if holder.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"`{' '.join(argv)}` made no time namespace")
                    time.sleep(POLL_SECONDS)
                yield
            finally:
                self.clock = None
                os.killpg(holder.pid, signal.SIGKILL)

    def unplug(self) -> None:
        """Pulls this host's cable: its own interface loses the carrier, the other host is told nothing."""
        self._cable("down")

    def plug(self) -> None:
        """Puts the cable back, and waits until the interface has its carrier."""
        self._cable("up")

    @contextmanager
    def firewall(self, port: int | None) -> Iterator[None]:
        """Has this host drop all TCP packets from the other one, but for those to or from `port` of either.

        Written as routing rules, which need nothing but `ip`: a packet that finds no route on its way in is dropped,
        and its sender is told nothing. Clients in the root namespace are let through.
        """
        if self.namespace is None:
            raise RuntimeError("loopback addresses have no firewall; use the fixture `namespaces`")
        clients = f"{self.address.rpartition('.')[0]}.254"
        allowed = [["from", clients]]
        if port is not None:
            allowed += [["iif", "eth0", "ipproto", "tcp", side, str(port)] for side in ("dport", "sport")]
        rules = [["pref", "100", "lookup", "local"]]
        rules += [["pref", str(number), *rule, "lookup", "local"] for number, rule in enumerate(allowed, 10)]
        rules += [["pref", "20", "iif", "eth0", "ipproto", "tcp", "blackhole"]]
        with ExitStack() as stack:
            for rule in rules:
                _ip("-n", self.namespace, "rule", "add", *rule)
                stack.callback(_ip, "-n", self.namespace, "rule", "delete", *rule)
            # The kernel's first rule knows this host's own addresses, and would come before all others.
            _ip("-n", self.namespace, "rule", "delete", "pref", "0")
            stack.callback(_ip, "-n", self.namespace, "rule", "add", "pref", "0", "lookup", "local")
            yield

    def listening(self) -> set[str]:
        """`address:port` of every TCP socket that listens on this host."""
        lines = self.run(["ss", "-tlnH"]).stdout.splitlines()
        return {line.split()[3] for line in lines}

    def _cable(self, state: Literal["up", "down"]) -> None:
        if self.outside is None or self.namespace is None:
            raise RuntimeError("loopback addresses have no cable; use the fixture `namespaces`")
        _ip("link", "set", self.outside, state)
        deadline = time.monotonic() + CARRIER_SECONDS
        while ((seen := _operational_state(self.namespace, self.interface)) == "UP") != (state == "up"):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.interface} of host {self.index} is {seen}, its cable is {state}")
            time.sleep(POLL_SECONDS)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command that runs a program on this host, from the root namespace."""
        argv = argv if self.cgroup is None else self.cgroup.command(argv)
        argv = argv if self.clock is None else ["nsenter", f"--time={self.clock}", *argv]
        if self.namespace is None:
            return list(argv)
        mounted = ["sh", "-c", WITH_OWN_SHARED_MEMORY, str(self.shared_memory)]
        return ["ip", "netns", "exec", self.namespace, *mounted, *argv]


Hosts = tuple[Host, Host]


@contextmanager
def two_hosts(logs: Path) -> Iterator[tuple[Hosts, str | None]]:
    """Makes the two hosts, and deletes them afterwards.

    Yields:
        The hosts, and None, or the reason why they are only two loopback addresses.
    """
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(_namespaces(logs))
        except CannotMake as reason:
            yield _loopback(logs), str(reason)
        else:
            yield hosts, None


class CannotMake(Exception):
    """This machine does not let us make network namespaces; the message says why."""


def _loopback(logs: Path) -> Hosts:
    return Host(0, "127.0.0.1", "lo", logs), Host(1, "127.0.0.2", "lo", logs)


@contextmanager
def _namespaces(logs: Path) -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        raise CannotMake("the program `ip` is missing (Debian package iproute2)")
    if os.geteuid() != 0:
        raise CannotMake("only root may make network namespaces")
    with ExitStack() as stack:
        try:
            hosts = _make_namespaces(logs, stack)
        except subprocess.CalledProcessError as error:
            raise CannotMake(f"`{' '.join(error.cmd)}` failed: {error.stderr.strip()}") from error
        yield hosts


def _make_namespaces(logs: Path, stack: ExitStack) -> Hosts:
    tag = f"{PREFIX}{os.getpid()}"
    bridge = f"{tag}b"
    with _one_at_a_time():
        _delete_leftovers()
        network = _free_network()
        _ip("link", "add", "name", bridge, "type", "bridge")
        stack.callback(_ip, "link", "delete", bridge)
        _ip("address", "add", f"{network}.254/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    return _add_host(0, tag, network, logs, stack), _add_host(1, tag, network, logs, stack)


def _add_host(index: int, tag: str, network: str, logs: Path, stack: ExitStack) -> Host:
    namespace, outside = f"{tag}h{index}", f"{tag}r{index}"
    address = f"{network}.{index + 1}"
    shared_memory = SHARED_MEMORY / namespace
    shared_memory.mkdir()
    stack.callback(shutil.rmtree, shared_memory)
    _ip("netns", "add", namespace)
    stack.callback(_delete_namespace, namespace)
    _ip("netns", "exec", namespace, "sh", "-c", WITH_OWN_SHARED_MEMORY, str(shared_memory), "true")
    _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    stack.callback(_ip, "link", "delete", outside)  # with the namespace it would go too, but some time later
    _ip("link", "set", outside, "master", f"{tag}b", "up")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
    for interface in ("lo", "eth0"):
        _ip("-n", namespace, "link", "set", interface, "up")
    return Host(index, address, "eth0", logs, namespace, outside, shared_memory)


def _operational_state(namespace: str, interface: str) -> str:
    (link,) = json.loads(_ip("-n", namespace, "-j", "link", "show", interface))
    return str(link["operstate"])


def _delete_namespace(name: str) -> None:
    """Ends what still runs there, then deletes the namespace and with it its end of the cable."""
    for pid in _ip("netns", "pids", name).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _ip("netns", "delete", name)


def _delete_leftovers() -> None:
    names = [entry["name"] for entry in json.loads(_ip("-j", "netns", "list") or "[]")]
    for name in names:
        if _orphaned(name):
            _delete_namespace(name)
    for name in [entry["ifname"] for entry in json.loads(_ip("-j", "link", "show", "type", "bridge") or "[]")]:
        if _orphaned(name):
            _ip("link", "delete", name)
    for folder in SHARED_MEMORY.glob(f"{PREFIX}*"):
        if _orphaned(folder.name):
            shutil.rmtree(folder)


def _orphaned(name: str) -> bool:
    match = LEFTOVER.fullmatch(name)
    return match is not None and not psutil.pid_exists(int(match[1]))


def _free_network() -> str:
    """The first three numbers of a /24 network that no interface here is in."""
    used = {
        address["local"].rpartition(".")[0]
        for interface in json.loads(_ip("-j", "-4", "address", "show"))
        for address in interface["addr_info"]
    }
    free = next((f"10.77.{number}" for number in range(256) if f"10.77.{number}" not in used), None)
    if free is None:
        raise CannotMake("every network from 10.77.0.0/24 to 10.77.255.0/24 is in use")
    return free


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keeps sessions that start together from choosing the same network."""
    with (Path(tempfile.gettempdir()) / "vllm-spark-test-hosts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ip(*arguments: str) -> str:
    return subprocess.run(
        ["ip", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=True
    ).stdout
