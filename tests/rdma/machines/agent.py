"""The first process of a machine after its root is there: runs commands for the host.

By itself it needs the standard library only.

Host and agent exchange lines of JSON over a virtio serial port. The host's lines:

    {"do": "start", "id": 7, "argv": [...], "env": {...}, "cwd": "/"}    run a program; ids are the host's choice
    {"do": "start", ..., "fork": true}                                   the same for ["python", "-m", MODULE, ...]
    {"do": "signal", "id": 7, "signal": 9}                               to the program and all of its session's group
    {"do": "sweep", "id": 8}                                             kill every process but this one

and the agent's:

    {"is": "ready"}                                                      once, when it can take commands
    {"is": "started", "id": 7, "pid": 120}
    {"is": "output", "id": 7, "stream": "stdout", "text": "..."}
    {"is": "exited", "id": 7, "code": 0}                                 minus the signal's number, as subprocess does
    {"is": "failed", "id": 7, "reason": "..."}                           the program could not be started
    {"is": "swept", "id": 8}

A module that is forked is imported here first, once, with all that it imports, which takes ten seconds under emulation.
It then runs as `python -m` would run it, in a process of its own.

As process 1 it inherits every orphan, so a sweep reaches what a command has left behind, and if it fails, the machine
ends with its traceback on the console.
"""

from __future__ import annotations

import atexit
import codecs
import importlib
import json
import os
import runpy
import selectors
import signal
import site
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

PORT_NAME = "agent"
CHUNK_BYTES = 65536
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "TERM": "dumb",
}


class Agent:
    """Serves one host until the machine ends."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._programs: dict[int, int] = {}
        """The id of a running command by its process id."""
        self._pipes: dict[int, list[Pipe]] = {}
        """The output of a command that has not reached its end, by the command's id."""
        self._unread = b""

    def serve(self) -> None:
        """Takes the host's commands, reports what becomes of them; does not return."""
        woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._selector.register(woken, selectors.EVENT_READ, lambda: self._reap(woken))
        self._selector.register(self._port, selectors.EVENT_READ, self._take)
        self._tell({"is": "ready"})
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _tell(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        while line:
            line = line[os.write(self._port, line) :]

    def _take(self) -> None:
        received = os.read(self._port, CHUNK_BYTES)
        if not received:
            raise EOFError("the host has closed the port")
        *lines, self._unread = (self._unread + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            {"start": self._start, "signal": self._signal, "sweep": self._sweep}[request["do"]](request)

    def _start(self, request: dict[str, Any]) -> None:
        try:
            pid, outputs = fork(request) if request.get("fork") else execute(request)
        except Exception as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else traceback.format_exc()
            self._tell({"is": "failed", "id": request["id"], "reason": reason})
            return
        self._programs[pid] = request["id"]
        self._pipes[request["id"]] = []
        for stream, descriptor in zip(("stdout", "stderr"), outputs, strict=True):
            pipe = Pipe(stream, descriptor)
            self._pipes[request["id"]].append(pipe)
            self._selector.register(pipe.fd, selectors.EVENT_READ, lambda pipe=pipe: self._relay(request["id"], pipe))
        self._tell({"is": "started", "id": request["id"], "pid": pid})

    def _relay(self, command: int, pipe: Pipe) -> bool:
        """Passes on what can be read now; False if there was nothing."""
        try:
            chunk = os.read(pipe.fd, CHUNK_BYTES)
        except BlockingIOError:
            return False
        if text := pipe.decoder.decode(chunk, final=not chunk):
            self._tell({"is": "output", "id": command, "stream": pipe.stream, "text": text})
        if not chunk:
            self._selector.unregister(pipe.fd)
            os.close(pipe.fd)
            self._pipes[command].remove(pipe)
        return bool(chunk)

    def _reap(self, woken: int) -> None:
        with suppress(BlockingIOError):
            os.read(woken, CHUNK_BYTES)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                self._report_end(*ended)

    def _report_end(self, pid: int, status: int) -> None:
        command = self._programs.pop(pid, None)
        if command is None:  # an orphan that came to us
            return
        # What it printed comes before its end. What its children print later is passed on then.
        for pipe in list(self._pipes[command]):
            while self._relay(command, pipe):
                pass
        self._tell({"is": "exited", "id": command, "code": os.waitstatus_to_exitcode(status)})

    def _signal(self, request: dict[str, Any]) -> None:
        for pid, command in self._programs.items():
            if command == request["id"]:
                with suppress(ProcessLookupError):
                    os.killpg(pid, request["signal"])

    def _sweep(self, request: dict[str, Any]) -> None:
        """Kills until nobody is left: a process may fork while it is being killed."""
        with suppress(ChildProcessError):
            while True:
                with suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)
                self._report_end(*os.waitpid(-1, 0))
        self._tell({"is": "swept", "id": request["id"]})


def execute(request: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """Starts a program; returns its process id and the reading ends of its standard output and error."""
    program = subprocess.Popen(
        request["argv"],
        env=ENVIRONMENT | request["env"],
        cwd=request["cwd"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.returncode = 0  # for subprocess it is over: only Agent._reap waits for children
    outputs = os.dup(program.stdout.fileno()), os.dup(program.stderr.fileno())
    program.stdout.close()
    program.stderr.close()
    return program.pid, outputs


def fork(request: dict[str, Any]) -> tuple[int, tuple[int, int]]:
    """The same for a module of Python, in a process that is forked from this one."""
    _, _, module, *arguments = request["argv"]
    if request["cwd"] not in sys.path:
        site.main()  # left out at the start
        sys.path.insert(0, request["cwd"])  # as `python -m` has it
    importlib.import_module(module)
    stdout, stderr = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become(request, stdout[1], stderr[1])
            code = run_module(module, arguments)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:  # never back into the agent's loop
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(stdout[1])
    os.close(stderr[1])
    return pid, (stdout[0], stderr[0])


def become(request: dict[str, Any], stdout: int, stderr: int) -> None:
    """Makes this forked process one with the session, descriptors, signals and environment of a new one."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update({**ENVIRONMENT, **request["env"]})
    os.chdir(request["cwd"])


def run_module(module: str, arguments: list[str]) -> int:
    """Runs a module as `python -m` does, to the end of its threads, and returns its exit code."""
    sys.argv = [module, *arguments]
    del sys.modules[module]  # it runs once more, as the main module; what it has imported stays
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return code


class Pipe:
    """The reading end of a program's output."""

    def __init__(self, stream: str, fd: int) -> None:
        self.stream = stream
        self.fd = fd
        self.decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        os.set_blocking(fd, False)


def open_port() -> int:
    """Opens the serial port that the host has named for us; there is no udev here that would name devices."""
    for port in Path("/sys/class/virtio-ports").iterdir():
        if (port / "name").read_text().strip() == PORT_NAME:
            return os.open(f"/dev/{port.name}", os.O_RDWR | os.O_CLOEXEC)
    sys.exit(f"this machine has no virtio serial port called {PORT_NAME!r}")


if __name__ == "__main__":
    Agent(open_port()).serve()
