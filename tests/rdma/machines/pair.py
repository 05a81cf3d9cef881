"""Both machines and their cables."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import packages
from .errors import MachineError
from .initramfs import initramfs
from .kernel import kernel
from .machine import MEMORY_MIB, Machine

Pair = tuple[Machine, Machine]


@contextmanager
def booted(folder: Path | None = None, memory_mib: int = MEMORY_MIB) -> Iterator[Pair]:
    """Boots both machines, and ends them afterwards.

    Args:
        folder: where consoles' logs go; made if it is missing. Default: a temporary one.
        memory_mib: of each.

    Raises:
        CannotRun: this host cannot boot machines; the message says why.
        MachineError: they did not come up.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="vllm-spark-machines-") as name, booted(Path(name), memory_mib) as pair:
            yield pair
        return
    pair = prepare(folder, memory_mib)
    try:
        boot(pair)
        yield pair
    finally:
        for machine in pair:
            machine.kill()


def prepare(folder: Path, memory_mib: int = MEMORY_MIB) -> Pair:
    """Both machines, not booted. Fetches a kernel if there is none in the cache.

    Raises:
        CannotRun: this host cannot boot machines; the message says why.
    """
    packages.require()
    booting = kernel()
    shared = folder / "shared"
    shared.mkdir(parents=True)
    archive = folder / "initramfs"
    archive.write_bytes(initramfs(booting, shared))
    return (
        Machine(0, folder, shared, booting, archive, memory_mib),
        Machine(1, folder, shared, booting, archive, memory_mib),
    )


def boot(pair: Pair) -> None:
    """Boots those that do not run, together, and waits for both.

    Raises:
        MachineError: they did not come up.
    """
    new = [machine for machine in pair if not machine.alive]
    for machine in new:
        machine.boot()
    for machine in new:
        machine.wait_ready()


def heal(pair: Pair) -> None:
    """Makes both as they were after their boot: running, with nothing else in them, all rails whole.

    Raises:
        MachineError: one does not do what it must; then it is ended, so that the next call boots it anew.
    """
    boot(pair)
    for machine in pair:
        try:
            machine.sweep()
            for rail in machine.rails:
                rail.heal()
        except MachineError:
            machine.kill()
            raise
