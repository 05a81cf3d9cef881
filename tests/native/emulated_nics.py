"""The rails of verbs_emulated.cpp, between processes of this machine, and what a test does to them."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

RAILS = ("memory0", "memory1")
_FIELDS = (
    *("cut", "port_down", "lose_over", "delay_us"),
    *("refuse_connect", "refuse_posts", "fail_next", "refuse_pinning", "hang", "flip_over", "packets"),
)
_WORD = struct.Struct("=I")


class EmulatedNics:
    """Two rails between two ranks of this machine.

    Args:
        folder: an empty folder that both ranks' processes see: packets go through files in it.
        library: the folder of the library, of `Programs.libibverbs("verbs_emulated.cpp")`.
    """

    def __init__(self, folder: Path, library: Path) -> None:
        self.folder, self.library = folder, library
        path = folder / "control"
        path.write_bytes(bytes(len(RAILS) * len(_FIELDS) * _WORD.size))
        with path.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), 0)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a process that uses them."""
        return {"LD_LIBRARY_PATH": str(self.library), "EMULATED_NICS": str(self.folder)}

    def use_in_this_process(self) -> None:
        """From now on whoever opens libibverbs in this process gets this one, if nobody has opened it before."""
        os.environ["EMULATED_NICS"] = str(self.folder)
        ctypes.CDLL(str(self.library / "libibverbs.so.1"), mode=ctypes.RTLD_GLOBAL)

    def set(self, field: str, value: int, *rails: int) -> None:
        """Writes a word of `RailControl` (verbs_emulated.cpp), for these rails or, without any, for all."""
        for rail in rails or range(len(RAILS)):
            at = self._offset(rail, field)
            self._control[at : at + _WORD.size] = _WORD.pack(value)

    @contextmanager
    def fault(self, field: str, value: int, *rails: int) -> Iterator[None]:
        """As `set`, and zero again at the end."""
        self.set(field, value, *rails)
        try:
            yield
        finally:
            self.set(field, 0, *rails)

    @contextmanager
    def failing_rails(
        self,
        faults: Sequence[tuple[str, int, tuple[int, ...]]],
        longest_fault: float,
        longest_pause: float,
        seed: int | None = None,
    ) -> Iterator[Counter[str]]:
        """Meanwhile one fault comes after the other, chosen by chance; counts them by field.

        Args:
            faults: field, value and rails of each.
            longest_fault, longest_pause: seconds of one, and between two.
            seed: of the choice.
        """
        chance, over, done = random.Random(seed), threading.Event(), Counter[str]()

        def fail() -> None:
            while not over.wait(chance.uniform(0, longest_pause)):
                field, value, rails = chance.choice(faults)
                with self.fault(field, value, *rails):
                    over.wait(chance.uniform(0, longest_fault))
                done[field] += 1

        thread = threading.Thread(target=fail)
        thread.start()
        try:
            yield done
        finally:
            over.set()
            thread.join()

    def packets(self, rail: int) -> int:
        """How many packets have arrived over a rail, both ways."""
        return int(_WORD.unpack_from(self._control, self._offset(rail, "packets"))[0])

    def close(self) -> None:
        """Deletes what processes that were killed have left."""
        self._control.close()
        for entry in self.folder.iterdir():
            entry.unlink()

    @staticmethod
    def _offset(rail: int, field: str) -> int:
        return (rail * len(_FIELDS) + _FIELDS.index(field)) * _WORD.size
