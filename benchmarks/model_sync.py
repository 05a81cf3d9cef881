"""How fast a model is copied from one machine to the other: ours, rsync over ssh, and what TLS itself takes.

    python -m benchmarks.model_sync [--gigabytes 4] [--files 40] [--rounds 3] [--json FILE]     # as root

Leader and follower are in two network namespaces with a cable between them, source and copy in memory (tmpfs). In
each round the candidates take turns:

- *ours*: the follower's search for a leader until the model is in place and compared, on as many streams as cores;
- *rsync*: `rsync -a --whole-file --inplace -e ssh` into an empty folder, with sshd in the follower's namespace, with
  the first cipher that ssh offers by itself, and with AES-GCM;
- *TLS ceiling*: on the loopback address, for each core one process that sends zeros from memory over TLS 1.3 and one
  that receives and drops them (`ssl.SSLSocket`, buffers of 1 MiB), as many bytes in all.

Ours includes the connections, the start of a process for each stream, and the comparison of all files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.serve.hosts import Hosts, two_hosts
from vllm_spark.bench.statistics import machine
from vllm_spark.executor.channel.certificates import tls_context
from vllm_spark.executor.channel.framing import MIB
from vllm_spark.executor.model_sync.receiver import MOST_STREAMS
from vllm_spark.processes.managed import ProcessError

SECRET = b"benchmark secret, 32 bytes long.."
BOUND = 600.0
SSHD_CONFIG = """Port 2222
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
"""


def make_model(folder: Path, gigabytes: float, files: int) -> int:
    """Writes the files; returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    size = int(gigabytes * 1e9) // files
    for number in range(files):
        with (folder / f"model-{number:05d}-of-{files:05d}.safetensors").open("wb") as file:
            left = size
            while left:
                left -= file.write(os.urandom(min(left, 16 * MIB)))
    return size * files + 2


def ours(hosts: Hosts, model: Path, home: Path) -> float:
    """Seconds from when a follower that runs looks for its leader until it has the model."""
    first, second = hosts
    port = str(first.free_port())
    secret = {"VLLMSPARK_SECRET": secrets.token_hex(16), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = [sys.executable, "-m", "tests.serve.copying"]
    arguments = ["--address", first.address, "--port", port, str(model)]
    leader = first.popen([*program, "leader", *arguments], secret, "leader", cold=True)
    try:
        leader.wait_for_line("^offers: ", BOUND)
        own = {"HOME": str(home), "XDG_DATA_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        arguments = ["follower", "--leader", first.address, "--port", port]
        follower = second.popen([*program, *arguments], secret | own, "follower", cold=True)
        place = Path(follower.wait_for_line("^place: (.*)$", BOUND)[1])
        seconds = float(follower.wait_for_line(r"^seconds: ([\d.]+)$", BOUND)[1])
        follower.wait(BOUND)
        assert sum(file.stat().st_size for file in place.iterdir()) == sum(f.stat().st_size for f in model.iterdir())
        return seconds
    finally:
        leader.terminate()


@contextmanager
def sshd(program: str, hosts: Hosts, folder: Path) -> Iterator[list[str]]:
    """sshd in the follower's namespace; yields the ssh command to reach it."""
    address = hosts[1].address
    for name in ("host_key", "key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, timeout=60)
    (folder / "config").write_text(SSHD_CONFIG.format(address=address, folder=folder))
    Path("/run/sshd").mkdir(exist_ok=True)
    daemon = hosts[1].popen([program, "-D", "-e", "-f", str(folder / "config")], {}, "sshd", cold=True)
    try:
        try:
            daemon.wait_for_line("Server listening", 30)
        except ProcessError:
            sys.exit(f"sshd did not start: {daemon.output()}")
        no_check = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        yield ["ssh", "-p", "2222", "-i", str(folder / "key"), *no_check]
    finally:
        daemon.terminate()


def rsync(hosts: Hosts, model: Path, target: Path, ssh: list[str]) -> float:
    """Seconds of one rsync."""
    assert hosts[0].namespace is not None
    program = str(shutil.which("rsync"))
    command = [program, "-a", "--whole-file", "--inplace", "-e", " ".join(ssh), "--rsync-path", program, f"{model}/"]
    start = time.perf_counter()
    done = hosts[0].run([*command, f"root@{hosts[1].address}:{target}/"], dict(os.environ), BOUND)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        sys.exit(f"rsync failed: {done.stderr}")
    return seconds


def ceiling(size: int, streams: int) -> float:
    """Seconds for so many bytes over as many streams of TLS alone."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2 * streams + 1)
    processes = []
    for _ in range(streams):
        server = socket.create_server(("127.0.0.1", 0))
        for work in (_send, _receive):
            processes.append(context.Process(target=work, args=(server, size // streams, barrier), daemon=True))
    for process in processes:
        process.start()
    barrier.wait(60)
    start = time.perf_counter()
    for process in processes:
        process.join(BOUND)
    seconds = time.perf_counter() - start
    if any(process.exitcode != 0 for process in processes):
        sys.exit("a process of the TLS ceiling failed; see its output above")
    return seconds


def _send(server: socket.socket, size: int, barrier: Any) -> None:
    plain, _ = server.accept()
    tls = tls_context(SECRET, "leader").wrap_socket(plain, server_side=True)
    buffer = memoryview(bytes(MIB))
    barrier.wait(60)
    while size > 0:
        tls.sendall(buffer[: min(MIB, size)])
        size -= MIB
    tls.recv(1)  # the end of the other side


def _receive(server: socket.socket, size: int, barrier: Any) -> None:
    plain = socket.create_connection(server.getsockname())
    tls = tls_context(SECRET, "follower").wrap_socket(plain)
    buffer = bytearray(MIB)
    barrier.wait(60)
    while size > 0:
        size -= tls.recv_into(buffer)
    tls.close()


def run(gigabytes: float, files: int, rounds: int) -> dict[str, Any]:
    """All rounds: seconds of each candidate, and the load of the machine before."""
    streams = min(len(os.sched_getaffinity(0)), MOST_STREAMS)
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="model-sync-")))
        # Not /dev/shm, of which each host has its own.
        subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True, timeout=30)
        stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], check=True, timeout=30)
        hosts, reason = stack.enter_context(two_hosts(folder))
        if reason is not None:
            sys.exit(reason)
        size = make_model(folder / "model", gigabytes, files)
        candidates: dict[str, Callable[[], float]] = {
            "ours": lambda: ours(hosts, folder / "model", target),
            "TLS ceiling": lambda: ceiling(size, streams),
        }
        daemon = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        if shutil.which("rsync") and daemon is not None:
            ssh = stack.enter_context(sshd(daemon, hosts, folder))
            candidates["rsync -e ssh"] = lambda: rsync(hosts, folder / "model", target, ssh)
            fast = [*ssh, "-c", "aes128-gcm@openssh.com"]
            candidates["rsync -e 'ssh -c aes128-gcm'"] = lambda: rsync(hosts, folder / "model", target, fast)
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        target = folder / "target"
        for _ in range(rounds):
            for name, measure in candidates.items():
                target.mkdir()
                seconds[name].append(measure())
                shutil.rmtree(target)
    return {"machine": machine(), "load": load, "bytes": size, "files": files, "streams": streams, "seconds": seconds}


def show(result: dict[str, Any]) -> None:
    """Prints medians, rates and ratios."""
    table = Table(title=f"{result['bytes'] / 1e9:.1f} GB in {result['files']} files, load {result['load']:.1f}")
    for column in ("candidate", "seconds, median", "GB/s", "of the ceiling", "of ours", "each round, s"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    for name, median in medians.items():
        rate, own = result["bytes"] / 1e9 / median, medians["ours"] / median
        rounds = " ".join(f"{value:.1f}" for value in result["seconds"][name])
        table.add_row(
            name, f"{median:.2f}", f"{rate:.2f}", f"{medians['TLS ceiling'] / median:.2f}", f"{own:.2f}", rounds
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = run(args.gigabytes, args.files, args.rounds)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
