"""Two virtual machines joined by two cables, each with a soft-RoCE device per cable.

    machine 0   eth0 10.0.0.1 rxe0  ===== rail 0 =====  rxe0 10.0.0.2 eth0   machine 1
                eth1 10.0.1.1 rxe1  ===== rail 1 =====  rxe1 10.0.1.2 eth1

QEMU emulates the processors, so nothing here needs KVM, and nothing here says anything about speed. A machine's root
is this machine's own, read-only, under a layer in memory: programs, the Python environment and the repository are
there under the same paths, and what is written there is gone at the end.

    from tests.rdma.machines import booted

    with booted() as pair:
        print(pair[0].run(["ping", "-c", "1", pair[1].rails[0].address], timeout=60).output)
"""

from .command import Command, CommandFailed, Finished
from .errors import CannotRun, MachineError
from .machine import Machine
from .pair import Pair, boot, booted, heal, prepare
from .rail import Rail

__all__ = [
    "CannotRun",
    "Command",
    "CommandFailed",
    "Finished",
    "Machine",
    "MachineError",
    "Pair",
    "Rail",
    "boot",
    "booted",
    "heal",
    "prepare",
]
