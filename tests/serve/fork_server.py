"""A process that has imported vLLM, and forks one process for each command line of `vllm` or `vllm-spark`.

Importing vLLM takes a core ten seconds, and a pair of servers consists of three processes that do so. This process has
imported it and has done nothing else: it has one thread, has loaded no plugin and has read no setting of this project.
A forked process goes on as a fresh one: with an environment, a session, an output file and a `sys.argv` of its own, it
runs the console script from its first line to the end of the process.

The Python processes that it starts in turn (vLLM's engine and workers, which multiprocessing spawns, and the session of
`vllm-spark join`) are forked too, from a `Spare`: a child that is made before the script runs and waits. They become
children of the process that starts them.

    python -m tests.serve.fork_server DESCRIPTOR

DESCRIPTOR is a SOCK_SEQPACKET socket to `forked_process.ForkServer`. It sends an `Order` and two descriptors, for the
output and for the exit code, and gets the process id. The server ends when the other end is closed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import json
import multiprocessing.util
import os
import re
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

IMPORTED = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.qwen3_moe",
    "vllm.model_executor.models.qwen3",
)
"""What servers of the tests import before they do anything else."""

IMPORTED_LATER = (
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "torch._dynamo.backends.inductor",
    "torch._inductor.codegen.cuda_combined_scheduling",
    "torch.export._trace",
    "sympy.tensor.tensor",
    "cryptography.x509",
)
"""What they import once they load a model and answer the first request, in the versions that have it."""

READ_LATE = re.compile(
    r"_?(VLLM_?)?SPARK_|VLLM_PLUGINS$|VLLM_SERVER_DEV_MODE$|VLLM_HOST_IP$|GLOO_SOCKET_IFNAME$"
    r"|(RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT)$|FAILING_|DYING_|PYTEST_|TMPDIR$"
    r"|VLLM_ENABLE_V1_MULTIPROCESSING$|VLLM_WORKER_MULTIPROC_METHOD$|VLLM_RPC_BASE_PATH$"
    # Those that vLLM's platform for CPUs sets before it starts its engine. LD_PRELOAD names the libgomp that torch has
    # loaded by then, NUMEXPR_MAX_THREADS is for a library that is not installed.
    r"|LD_PRELOAD$|LOCAL_WORLD_SIZE$|NUMEXPR_MAX_THREADS$|TORCHINDUCTOR_CPP_DYNAMIC_THREADS$"
    r"|VLLM_SSM_CONV_STATE_LAYOUT$|VLLM_DISABLE_SHARED_EXPERTS_STREAM$"
    # Of what is imported only vLLM's statistics of usage read it, which are off.
    r"|XDG_CONFIG_HOME$"
)
"""Matches variables that neither vLLM nor what it imports reads while it is imported, or that `_apply` applies."""

SPARE_TITLE = "spare process of tests.serve.fork_server"
MESSAGE_BYTES = 1 << 20
EXIT_CODE = struct.Struct("i")

_TESTS = str(Path(__file__).parents[2])
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Order:
    """A process to be forked.

    Attributes:
        argv: a console script with its arguments, or the command of a Python process (`-m MODULE`, `-c CODE`).
        environment: its whole environment.
        descriptors: the numbers under which it has the descriptors that are sent along.
        own_session: whether it leads a session of its own.
        end_with_parent: whether the kernel kills it when its parent ends.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    descriptors: Sequence[int]
    own_session: bool = True
    end_with_parent: bool = False


def send_order(connection: socket.socket, order: Order, descriptors: Sequence[int]) -> int:
    """Sends an order with its descriptors, and returns the id of the forked process."""
    socket.send_fds(connection, [json.dumps(asdict(order)).encode()], descriptors)
    answer = connection.recv(MESSAGE_BYTES)
    if not answer:
        raise ConnectionError("the fork server has ended")
    return int(answer)


def _receive_order(connection: socket.socket) -> tuple[Order, list[int]] | None:
    message, descriptors, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 64)
    return (Order(**json.loads(message)), descriptors) if message else None


class ForkServer:
    """The server: forks processes of its own, and tells how they ended."""

    def __init__(self, connection: socket.socket, environment: Mapping[str, str]) -> None:
        self._connection = connection
        self._before_imports = environment
        self._children: dict[int, tuple[int, int]] = {}  # pidfd -> process id, descriptor for the exit code

    def run(self) -> None:
        """Serves until the other end is closed."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self._connection.fileno():
                    received = _receive_order(self._connection)
                    if received is None:
                        return
                    poll.register(self._fork(*received), select.POLLIN)
                else:
                    poll.unregister(descriptor)
                    self._report(descriptor)

    def _fork(self, order: Order, descriptors: list[int]) -> int:
        *given, exit_code = descriptors
        pid = os.fork()
        if pid == 0:
            self._connection.close()
            os.close(exit_code)
            for pidfd, (_, other) in self._children.items():
                os.close(pidfd)
                os.close(other)
            become(order, given, Imports(self._before_imports))
        for descriptor in given:
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        self._children[pidfd] = pid, exit_code
        self._connection.send(str(pid).encode())
        return pidfd

    def _report(self, pidfd: int) -> None:
        pid, exit_code = self._children.pop(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        os.write(exit_code, EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
        os.close(exit_code)


class Imports:
    """The environment variables with which the imports were made, and those that they have set.

    Made before the environment is another one.
    """

    def __init__(self, before: Mapping[str, str]) -> None:
        self.before = before
        self.set = {name: value for name, value in os.environ.items() if before.get(name) != value}

    def suit(self, environment: Mapping[str, str]) -> bool:
        """Whether a new process with this environment, of a parent that has made the imports, would make the same."""
        own = {name: value for name, value in environment.items() if self.set.get(name) != value}
        return read_late({**{name: self.before[name] for name in self.set if name in self.before}, **own}, self.before)


class Spare:
    """A child that is as its parent was at the parent's start, and forks processes that become children of the parent.

    It forks twice: the process between the two ends at once, and the kernel gives its child to the next ancestor that
    asks for orphans, which the parent does meanwhile.
    """

    def __init__(self, imports: Imports) -> None:
        self.imports = imports
        self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        parent = os.getpid()
        if os.fork() == 0:
            self._connection.close()
            _serve_as_spare(other, parent, imports)
        other.close()

    def fork(self, order: Order, descriptors: Sequence[int]) -> int:
        """Forks a process that becomes a child of this one; returns its id."""
        with self._lock:
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                return send_order(self._connection, order, descriptors)
            finally:
                _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _serve_as_spare(connection: socket.socket, parent: int, imports: Imports) -> NoReturn:
    _end_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they go to the whole process group
        signal.signal(number, signal.SIG_IGN)
    _set_title(SPARE_TITLE)
    while (received := _receive_order(connection)) is not None:
        order, descriptors = received
        ready, told = os.pipe()
        between = os.fork()
        if between == 0:
            between = os.getpid()
            child = os.fork()
            if child != 0:
                os.write(told, str(child).encode())
                os._exit(0)
            connection.close()
            os.close(ready)
            os.close(told)
            while os.getppid() == between:  # some microseconds
                os.sched_yield()
            if os.getppid() != parent:
                os._exit(1)
            become(order, descriptors, imports)
        os.waitpid(between, 0)
        connection.send(os.read(ready, 32))
        for descriptor in (ready, told, *descriptors):
            os.close(descriptor)
    os._exit(0)


def _end_with_parent(parent: int) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _set_title(title: str) -> None:
    from setproctitle import setproctitle  # a dependency of vLLM

    setproctitle(title)


def become(order: Order, descriptors: Sequence[int], imports: Imports) -> NoReturn:
    """Goes on as the ordered process would after its imports, to the process's end."""
    if order.own_session:
        os.setsid()
    if order.end_with_parent:
        _end_with_parent(os.getppid())
    _take_descriptors(descriptors, order.descriptors)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update({**order.environment, **imports.set})
    tempfile.tempdir = None  # depends on the environment
    if "PYTHONPATH" not in order.environment:  # this one's has the folder of the tests
        others = [folder for folder in sys.path if folder != _TESTS]
        sys.path[:] = [*others, _TESTS] if _installed_by_path() else others
    _apply(os.environ)
    _fork_what_would_import_vllm(Spare(imports))
    _set_title(" ".join(order.argv))
    _end(_run(order.argv))


def _apply(environment: Mapping[str, str]) -> None:
    """Sets what torch has read from variables at its import, where they may be others now."""
    inductor = sys.modules.get("torch._inductor.config")
    if inductor is not None:
        inductor.cpp.dynamic_threads = environment.get("TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "0") == "1"


def _installed_by_path() -> bool:
    """Whether the package is installed editable, by a path that every process of this Python gets at its start."""
    files = Path(sysconfig.get_path("purelib")).glob("__editable__*.pth")
    return any(_TESTS in file.read_text(encoding="utf-8").splitlines() for file in files)


def _take_descriptors(given: Sequence[int], wanted: Sequence[int]) -> None:
    """Gives the received descriptors their numbers; what had such a number before is closed."""
    above = max((*given, *wanted)) + 1
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in given]
    for each in given:
        os.close(each)
    for each, number in zip(moved, wanted, strict=True):
        os.dup2(each, number, inheritable=True)
        os.close(each)


def _run(argv: Sequence[str]) -> Callable[[], NoReturn]:
    """Runs the program, and returns what then ends the process."""
    try:
        if argv[0] != sys.executable:
            sys.argv = list(argv)
            sys.path.insert(0, os.path.dirname(argv[0]))
            runpy.run_path(argv[0], run_name="__main__")
        elif "-m" in argv:
            module = argv.index("-m") + 1
            sys.argv = list(argv[module:])
            runpy.run_module(argv[module], run_name="__main__", alter_sys=True)
        else:
            code = argv.index("-c") + 1
            sys.argv = ["-c", *argv[code + 1 :]]
            assert isinstance(sys.stdout, TextIOWrapper), "nothing has replaced it yet"
            sys.stdout.reconfigure(write_through="-u" in argv[:code])
            sys.modules["__main__"] = ModuleType("__main__")
            exec(argv[code], vars(sys.modules["__main__"]))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return lambda: os._exit(1)
        number = 0 if end.code is None else int(end.code)
        return lambda: os._exit(number)
    except KeyboardInterrupt:
        traceback.print_exc()
        return _end_by_interrupt
    except BaseException:
        traceback.print_exc()
        return lambda: os._exit(1)
    return lambda: os._exit(0)


def _end(how: Callable[[], NoReturn]) -> NoReturn:
    """Ends as the interpreter does, but does not take vLLM's modules apart, for which they would be copied first."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        how()


def _end_by_interrupt() -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    raise AssertionError("SIGINT ends this process")


def read_late(environment: Mapping[str, str], imported_with: Mapping[str, str]) -> bool:
    """Whether the imports would do the same with this environment as they did with the other one."""
    environment = {"PYTHONPATH": _TESTS, **environment}
    names = environment.keys() | imported_with.keys()
    return all(READ_LATE.match(name) for name in names if environment.get(name) != imported_with.get(name))


def is_forked(argv: Sequence[str]) -> bool:
    """Whether a command is one of those that import vLLM: a console script, a module or a program for Python."""
    if argv[0] != sys.executable:
        return argv[0] in (os.path.join(sysconfig.get_path("scripts"), name) for name in ("vllm", "vllm-spark"))
    return "-m" in argv or any("import vllm" in word or "from vllm" in word for word in argv)


def _fork_what_would_import_vllm(spare: Spare) -> None:
    """Has the spare fork what would be a new Python process with vLLM; other programs start as ever."""
    spawn = multiprocessing.util.spawnv_passfds

    def spawnv_passfds(path: Any, args: Sequence[Any], passfds: Sequence[int]) -> int:
        argv = [os.fsdecode(each) for each in args]
        # Its resource tracker imports little.
        if not any("spawn_main" in each for each in argv) or not spare.imports.suit(os.environ):
            return spawn(path, args, passfds)
        descriptors = [0, 1, 2, *passfds]
        return spare.fork(Order(argv, dict(os.environ), descriptors, own_session=False), descriptors)

    class Popen(subprocess.Popen[Any]):
        """Overrides where a program is executed; to wait for it and to signal it is as ever."""

        def __init__(self, *args: Any, start_new_session: bool = False, **more: Any) -> None:
            self._own_session = start_new_session
            super().__init__(*args, start_new_session=start_new_session, **more)

        def _execute_child(
            self,
            args: Any,
            executable: Any,
            preexec_fn: Any,
            close_fds: Any,
            pass_fds: Any,
            cwd: Any,
            env: Any,
            *rest: Any,
        ) -> None:
            environment = dict(os.environ if env is None else env)
            if not is_forked(args) or not spare.imports.suit(environment):
                super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)  # type: ignore[misc]
                return
            pipes = rest[3:9]
            standard = [own if given == -1 else given for own, given in enumerate((pipes[0], pipes[3], pipes[5]))]
            ends = preexec_fn is not None
            assert not ends or preexec_fn.__qualname__.startswith("end_with_parent"), "another preexec_fn"
            order = Order(list(args), environment, [0, 1, 2, *pass_fds], self._own_session, ends)
            self.pid = spare.fork(order, [*standard, *pass_fds])
            self._child_created = True
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    multiprocessing.util.spawnv_passfds = spawnv_passfds
    subprocess.Popen = Popen  # type: ignore[misc]


def main() -> None:
    """Imports vLLM, and serves."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    _set_title(" ".join(sys.orig_argv))  # finds the place of the title while the environment is where the kernel put it
    before = dict(os.environ)
    for name in IMPORTED:
        import_module(name)
    for name in IMPORTED_LATER:
        with contextlib.suppress(ModuleNotFoundError):
            import_module(name)
    plugins = import_module("vllm.plugins")
    assert not plugins.plugins_loaded, "vLLM loads plugins while it is imported"
    assert not any(name.startswith("vllm_spark") for name in sys.modules), "vLLM's import has imported this project"
    assert len(os.listdir("/proc/self/task")) == 1, "vLLM starts threads while it is imported"
    gc.collect()
    gc.freeze()  # the collector of a forked process leaves these objects, and so their memory, alone
    ForkServer(connection, before).run()


if __name__ == "__main__":
    main()
