"""Tests of the two virtual machines themselves, which the other tests of this folder use and so check as well."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from .machines import CommandFailed, Machine, MachineError, Pair, Rail, heal

BOUND = 120.0
"""Seconds for a command that takes one where nothing else runs."""
PEER_PYTHON = "/usr/bin/python3"
"""Debian's own, for which its pyverbs was built."""
HERE = Path(__file__).parent

pytestmark = pytest.mark.thorough


def ping(machine: Machine, rail: Rail, *options: str) -> str:
    """The output of a ping of the other end of a rail; raises CommandFailed if nothing at all came back."""
    return machine.run(["busybox", "ping", *options, rail.address], timeout=BOUND).stdout


def reaches(machine: Machine, rail: Rail) -> bool:
    """Whether one of a few pings comes back: the first may be lost to the search for the neighbour."""
    finished = machine.run(["busybox", "ping", "-A", "-c", "5", "-W", "2", rail.address], timeout=BOUND, check=False)
    return finished.exit_code == 0


def test_each_machine_has_two_rdma_devices(machines: Pair) -> None:
    for machine in machines:
        devices = machine.run(["ls", "/sys/class/infiniband"], timeout=BOUND).stdout.split()
        assert devices == ["rxe0", "rxe1"]
        for rail in machine.rails:
            port = f"/sys/class/infiniband/{rail.device}/ports/1"
            state = machine.run(["cat", f"{port}/state"], timeout=BOUND).stdout.strip()
            assert state == "4: ACTIVE"
            assert rail.device in machine.run(["ibv_devices"], timeout=BOUND).stdout


def test_a_command_gives_its_output_and_exit_code(machines: Pair) -> None:
    for machine in machines:
        finished = machine.run(
            ["sh", "-c", "echo out; echo err >&2; echo $MACHINE $X; exit 7"], BOUND, env={"X": "x"}, check=False
        )
        assert finished.exit_code == 7
        assert finished.stdout == f"out\n{machine.index} x\n"
        assert finished.stderr == "err\n"
    with pytest.raises(CommandFailed, match=r"`sh -c 'echo last words; false'` on machine 0 ended with exit code 1"):
        machines[0].run(["sh", "-c", "echo last words; false"], timeout=BOUND)
    with pytest.raises(MachineError, match=r"could not be started: /no/such/program: No such file"):
        machines[0].run(["/no/such/program"], timeout=BOUND)


def test_a_module_that_is_forked_runs_as_a_new_process_does(machines: Pair) -> None:
    one = machines[0]
    for arguments, code in ((["2026", "2"], 0), (["no-year"], 2)):
        words = ["python", "-m", "calendar", *arguments]
        new, forked = (one.start(words, fork=fork).wait(BOUND) for fork in (False, True))
        assert new.exit_code == code
        assert forked == new
    with pytest.raises(MachineError, match=r"(?s)could not be started: .*No module named 'no_such_module'"):
        one.start(["python", "-m", "no_such_module"], fork=True)


def test_long_output_arrives_whole(machines: Pair) -> None:
    script = "for n in range(100_000): print(n, 'straße')"
    output = machines[0].run(["python", "-c", script], timeout=BOUND).stdout
    assert output == "".join(f"{n} straße\n" for n in range(100_000))


def test_a_command_that_does_not_end_is_killed(machines: Pair) -> None:
    with pytest.raises(MachineError, match=r"`sleep 4711` on machine 1 has not ended after 1 s"):
        machines[1].run(["sleep", "4711"], timeout=1)
    assert "4711" not in machines[1].run(["ps", "-A", "-o", "args="], timeout=BOUND).stdout


def test_output_streams_while_a_command_runs(machines: Pair) -> None:
    command = machines[0].start(["sh", "-c", "echo begun; sleep 3600"])
    command.wait_for_line("^begun$", timeout=BOUND)
    assert command.exit_code is None
    command.kill()
    assert command.exit_code == -signal.SIGKILL


def test_what_a_test_leaves_is_gone(machines: Pair) -> None:
    """A daemon that its command's end does not end, and two broken rails: the fixture, too, calls `heal`."""
    one, other = machines
    daemon = "import os, time; os.fork() or (os.setsid(), print('hidden', flush=True)); time.sleep(3600)"
    command = one.start(["python", "-c", daemon])
    command.wait_for_line("hidden", timeout=BOUND)
    command.kill()
    assert "hidden" in one.run(["ps", "-A", "-o", "args="], timeout=BOUND).stdout
    one.rails[0].impair("loss", "100%")
    one.rails[0].down()
    other.rails[1].unplug()
    heal(machines)
    assert "hidden" not in one.run(["ps", "-A", "-o", "args="], timeout=BOUND).stdout
    assert "netem" not in one.run(["tc", "qdisc", "show"], timeout=BOUND).stdout
    for rail in other.rails:
        assert reaches(one, rail)


def test_the_repository_is_there_and_cannot_be_changed(machines: Pair) -> None:
    content = machines[0].run(["cat", __file__], timeout=BOUND).stdout
    assert content == Path(__file__).read_text()
    written = HERE / "written-in-a-machine"
    machines[0].run(["touch", str(written)], timeout=BOUND)
    assert not written.exists()
    machines[1].run(["test", "!", "-e", str(written)], timeout=BOUND)


def test_the_shared_folder_is_shared(machines: Pair) -> None:
    one, other = machines
    file = one.shared / "letter"
    one.run(["sh", "-c", f"echo from a machine > {file}"], timeout=BOUND)
    assert file.read_text() == "from a machine\n"
    file.write_text("from the host\n")
    assert other.run(["cat", str(file)], timeout=BOUND).stdout == "from the host\n"


def test_the_native_module_loads(machines: Pair) -> None:
    for machine in machines:
        machine.run(["python", "-c", "import vllm_spark._native"], timeout=BOUND)


def test_they_reach_each_other_on_both_rails(machines: Pair) -> None:
    for machine, other in (machines, machines[::-1]):
        for rail in other.rails:
            assert reaches(machine, rail)


@pytest.mark.parametrize("end", [0, 1], ids=["own cable", "peer's cable"])
def test_a_pulled_cable_cuts_one_rail_until_it_is_plugged(machines: Pair, end: int) -> None:
    one, other = machines
    machines[end].rails[0].unplug()
    assert not reaches(one, other.rails[0])
    assert reaches(one, other.rails[1])
    carriers = [m.run(["cat", "/sys/class/net/eth0/carrier"], timeout=BOUND).stdout.strip() for m in machines]
    assert carriers == (["0", "1"] if end == 0 else ["1", "0"])
    machines[end].rails[0].plug()
    assert reaches(one, other.rails[0])


def test_an_interface_goes_down_and_comes_back(machines: Pair) -> None:
    one, other = machines
    other.rails[1].down()
    assert not reaches(one, other.rails[1])
    assert reaches(one, other.rails[0])
    other.rails[1].up()
    assert reaches(one, other.rails[1])


def test_delay_and_loss_are_seen(machines: Pair) -> None:
    one, other = machines
    one.rails[0].impair("delay", "400ms")
    times = [float(ms) for ms in re.findall(r"time=([\d.]+) ms", ping(one, other.rails[0], "-c", "3"))]
    assert len(times) == 3
    assert min(times) >= 400  # a delay is a lower bound, however slow the machine
    one.rails[0].impair("loss", "100%")
    assert not reaches(one, other.rails[0])
    one.rails[0].unimpair()
    assert reaches(one, other.rails[0])


def test_rdma_writes_arrive_over_each_rail(machines: Pair) -> None:
    for rail in (0, 1):
        ends = [machine.rails[rail] for machine in machines]
        commands = [
            machine.start([PEER_PYTHON, str(HERE / "pyverbs_write.py"), own.device, own.address, other.address])
            for machine, own, other in zip(machines, ends, reversed(ends), strict=True)
        ]
        for command, sender in zip(commands, reversed(ends), strict=True):
            finished = command.wait(BOUND)
            assert finished.exit_code == 0
            assert finished.stdout == f"from {sender.address} over {sender.device}\n"


def test_a_machine_that_dies_is_noticed_and_boots_again(machines: Pair) -> None:
    one, other = machines
    command = other.start(["sleep", "3600"])
    other.kill()
    assert not other.alive
    with pytest.raises(MachineError, match=r"`sleep 3600` on machine 1 has not ended: machine 1 ended"):
        command.wait(timeout=BOUND)
    with pytest.raises(MachineError, match="machine 1 ended"):
        other.run(["true"], timeout=BOUND)
    assert not reaches(one, other.rails[0])
    heal(machines)
    for rail in other.rails:
        assert reaches(one, rail)


def test_machines_die_with_the_process_that_booted_them(machines: Pair, tmp_path: Path) -> None:
    """It is killed with signal 9, so it can do nothing about it itself."""
    program = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from tests.rdma.machines import prepare
        pair = prepare(Path(sys.argv[1]))
        for machine in pair:
            machine.boot()
        print(*(machine.pid for machine in pair), flush=True)
        time.sleep(3600)
        """
    )
    booter = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "machines")],
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert booter.stdout is not None
    pids = [int(word) for word in booter.stdout.readline().split()]
    assert len(pids) == 2
    assert all(_runs_qemu(pid) for pid in pids)
    booter.kill()
    booter.wait(BOUND)
    deadline = time.monotonic() + BOUND
    try:
        while left := [pid for pid in pids if _runs_qemu(pid)]:
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.1)
    finally:
        for pid in pids:
            if _runs_qemu(pid):
                os.kill(pid, signal.SIGKILL)


def _runs_qemu(pid: int) -> bool:
    try:
        return "qemu" in os.readlink(f"/proc/{pid}/exe")
    except OSError:
        return False
