"""One virtual machine: boots, runs commands, ends."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_spark.processes.child import end_with_parent

from .command import ANSWER_SECONDS, Command, CommandFailed, Finished
from .errors import MachineError
from .kernel import Kernel
from .monitor import Monitor
from .rail import RAILS, Rail

REPOSITORY = Path(__file__).parents[3]
BOOT_SECONDS = 300.0
"""A boot takes 10 to 20 s where nothing else runs."""
LINES_SHOWN = 60
MEMORY_MIB = 3072
KERNEL_OPTIONS = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr audit=0 net.ifnames=0 random.trust_cpu=on"
"""Among them: a panic ends the machine, and interfaces are called eth0 and eth1."""
MODULES = ("virtio_rng", "virtio_net", "rdma_rxe", "ib_uverbs", "rdma_ucm")
"""Kernel modules that nothing in a machine would ask for; the others come by themselves."""


class Machine:
    """One of the two machines. `boot` and `wait_ready` start it, `kill` ends it, and then it can boot again.

    Args:
        index: 0 or 1.
        folder: where its console's output and the ends of its cables are.
        shared: a folder that the host and the machines write, under the same path on both sides.
        kernel, archive: what it boots; the archive is the initramfs.
        memory_mib: of which three quarters may be files that are written inside.
    """

    def __init__(
        self, index: int, folder: Path, shared: Path, kernel: Kernel, archive: Path, memory_mib: int = MEMORY_MIB
    ) -> None:
        self.index = index
        self.name = f"machine {index}"
        self.rails = tuple(Rail(self, number) for number in range(RAILS))
        self.shared = shared
        self._folder = folder
        self._kernel = kernel
        self._archive = archive
        self._memory_mib = memory_mib
        self._qemu: subprocess.Popen[bytes] | None = None
        self._monitor: Monitor | None = None
        self._agent: socket.socket | None = None
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._boots = 0
        self._ready = False
        self._numbers = itertools.count(1)
        self._commands: dict[int, Command] = {}
        self._swept: set[int] = set()

    @property
    def alive(self) -> bool:
        """Whether its virtual machine runs."""
        return self._qemu is not None and self._qemu.poll() is None

    @property
    def pid(self) -> int | None:
        """The process id of its QEMU; None before the first boot."""
        return None if self._qemu is None else self._qemu.pid

    @property
    def commands(self) -> list[Command]:
        """Those started since the last boot or sweep, oldest first, also those of its rails."""
        return list(self._commands.values())

    @property
    def console(self) -> str:
        """What its kernel has printed since it was last booted."""
        return _read(self._console)

    @property
    def monitor(self) -> Monitor:
        """QEMU's own control of the machine."""
        if self._monitor is None or not self.alive:
            raise MachineError(self._obituary())
        return self._monitor

    def boot(self) -> None:
        """Starts it, and does not wait. It dies with the thread that calls this, so let that be the main thread."""
        assert not self.alive, f"{self.name} runs already"
        self._boots += 1
        self._ready = False
        self._commands.clear()
        agent, agent_end = socket.socketpair()
        monitor, monitor_end = socket.socketpair()
        with agent_end, monitor_end, self._log.open("wb") as log:
            self._qemu = subprocess.Popen(
                self._qemu_command(agent_end.fileno(), monitor_end.fileno()),
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(agent_end.fileno(), monitor_end.fileno()),
                preexec_fn=end_with_parent(os.getpid()),
                start_new_session=True,
            )
        self._monitor = Monitor(monitor, self.name)
        self._agent = agent
        threading.Thread(target=self._listen, args=(agent, self._boots), daemon=True).start()

    def wait_ready(self, timeout: float = BOOT_SECONDS) -> None:
        """Waits until it takes commands, then brings its rails up.

        Raises:
            MachineError: it did not come up in `timeout` seconds; the message has the console's last lines.
        """
        self.wait_until(lambda: self._ready, timeout, f"{self.name} has not booted")
        self.run(["modprobe", "--all", *MODULES], timeout=ANSWER_SECONDS)
        for rail in self.rails:
            rail.make()

    def run(
        self,
        argv: Sequence[str],
        timeout: float,
        env: Mapping[str, str] | None = None,
        cwd: Path = REPOSITORY,
        check: bool = True,
    ) -> Finished:
        """Runs a program to its end, for at most `timeout` seconds; then it is killed.

        Raises:
            CommandFailed: its exit code is not 0, and `check` is left True.
            MachineError: it did not end in time, could not be started, or the machine ended.
        """
        command = self.start(argv, env, cwd)
        try:
            finished = command.wait(timeout)
        except MachineError:
            with suppress(MachineError):
                command.kill()
            raise
        if check and finished.exit_code != 0:
            raise CommandFailed(f"{command} ended with exit code {finished.exit_code}{self.last_words(command)}")
        return finished

    def start(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = REPOSITORY, *, fork: bool = False
    ) -> Command:
        """Starts a program, with `env` on top of a plain environment; `MACHINE` there is this machine's index.

        "python" as its first word is the interpreter that runs the tests. With `fork` the words must be "python", "-m"
        and a module, whose imports are then made once for all such commands of a boot.

        Raises:
            MachineError: it could not be started, or the machine ended.
        """
        words = [sys.executable if argv[0] == "python" else str(argv[0]), *map(str, argv[1:])]
        command = Command(self, next(self._numbers), tuple(words), self._boots)
        self._commands[command.id] = command
        environment = {"MACHINE": str(self.index), **(env or {})}
        request = {"do": "start", "id": command.id, "argv": words, "env": environment, "cwd": str(cwd)}
        self.ask({**request, "fork": True} if fork else request)
        self.wait_until(
            lambda: command.pid is not None or command.failure is not None, ANSWER_SECONDS, f"{command} has not started"
        )
        if command.failure is not None:
            raise MachineError(f"{command} could not be started: {command.failure}")
        return command

    def sweep(self) -> None:
        """Kills every process in it but the agent.

        Raises:
            MachineError: some do not end, or the machine has.
        """
        number = next(self._numbers)
        self.ask({"do": "sweep", "id": number})
        self.wait_until(lambda: number in self._swept, ANSWER_SECONDS, f"the processes of {self.name} have not ended")
        self._commands.clear()

    def kill(self) -> None:
        """Ends it as pulling its plug would; what it was doing is lost."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()

    def ask(self, request: Mapping[str, Any]) -> None:
        """Sends one line to the agent; used by `Command`.

        Raises:
            MachineError: the machine has ended.
        """
        try:
            if self._agent is None or not self._ready:
                raise ConnectionError
            with self._sending:
                self._agent.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            raise MachineError(self._obituary()) from None

    def wait_until(
        self, condition: Callable[[], object], timeout: float, what_is_missing: str, command: Command | None = None
    ) -> None:
        """Waits at most `timeout` seconds for a condition that messages of the agent can make true.

        Raises:
            MachineError: the time is over or the machine ended; the message starts with `what_is_missing`.
        """
        deadline = time.monotonic() + timeout
        boot = self._boots if command is None else command.boot
        with self._changed:
            while not condition():
                if not self.alive or self._boots != boot:
                    raise MachineError(f"{what_is_missing}: {self._obituary()}{self.last_words(command)}")
                if time.monotonic() > deadline:
                    raise MachineError(f"{what_is_missing} after {timeout:g} s{self.last_words(command)}")
                self._changed.wait(0.2)

    def last_words(self, command: Command | None = None) -> str:
        """The last lines of a command and of the console, for messages."""
        parts = [] if command is None else [("it printed", command.output)]
        parts += [(f"console of {self.name}", self.console), (f"QEMU of {self.name}", _read(self._log))]
        return "".join(
            f"\n--- {title}:\n" + "\n".join(text.splitlines()[-LINES_SHOWN:]) for title, text in parts if text.strip()
        )

    @property
    def _console(self) -> Path:
        return self._folder / f"console-{self.index}-{self._boots}.log"

    @property
    def _log(self) -> Path:
        return self._folder / f"qemu-{self.index}-{self._boots}.log"

    def _obituary(self) -> str:
        if self._qemu is None:
            return f"{self.name} was not booted"
        code = self._qemu.poll()
        return f"{self.name} has not booted yet" if code is None else f"{self.name} ended (QEMU's exit code {code})"

    def _listen(self, agent: socket.socket, boot: int) -> None:
        """Reads what the agent says until the machine ends."""
        with suppress(OSError), agent, agent.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                with self._changed:
                    if boot != self._boots:
                        break
                    self._hear(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _hear(self, message: dict[str, Any]) -> None:
        kind = message["is"]
        command = self._commands.get(message.get("id", 0))
        if kind == "ready":
            self._ready = True
        elif kind == "swept":
            self._swept.add(message["id"])
        elif command is None:
            pass  # of an earlier test
        elif kind == "started":
            command.pid = message["pid"]
        elif kind == "failed":
            command.failure = message["reason"]
        elif kind == "output":
            command.chunks.append((message["stream"], message["text"]))
        elif kind == "exited":
            command.exit_code = message["code"]

    def _qemu_command(self, agent: int, monitor: int) -> list[str]:
        """Sockets and consoles are named relative to the folder: the path of a socket must be short.

        The processor has no CMPXCHG16B: QEMU 7.2 leaves garbage in its flags, and where an interrupt comes right after
        it, in the kernel's allocator while soft-RoCE makes packets, the kernel ends by a double fault.
        """
        options = [
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-machine", "q35", "-cpu", "max,la57=off,cx16=off", "-smp", "1", "-m", str(self._memory_mib)),
            *("-accel", "tcg,thread=multi,tb-size=512"),
            *(
                "-kernel",
                str(self._kernel.image),
                "-initrd",
                str(self._archive),
                "-append",
                f"{KERNEL_OPTIONS} hostname=machine{self.index}",
            ),
            *("-chardev", f"file,id=console,path={self._console.name}", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"),
            *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,fd={agent}"),
            *("-device", "virtserialport,chardev=agent,name=agent"),
            *("-device", "virtio-rng-pci"),
            *_folder("host", Path("/"), "readonly=on"),
            *_folder("shared", self.shared),
            *(option for rail in self.rails for option in rail.qemu_options()),
        ]
        return ["qemu-system-x86_64", *options]


def _read(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def _folder(tag: str, path: Path, *more: str) -> tuple[str, ...]:
    """QEMU's options for a folder of the host that the machine mounts by its tag."""
    quoted = str(path).replace(",", ",,")
    local = ",".join([f"local,id={tag},path={quoted},security_model=none,multidevs=remap", *more])
    return ("-fsdev", local, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}")
