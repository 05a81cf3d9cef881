"""Programs of the native code for tests: each source is compiled once for each set of flags, some at a time.

That holds for the workers of a test run together: what one is compiling, another one waits for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
BINDINGS = CSRC / "bindings.cpp"
RUNTIME = tuple(path for path in sorted(CSRC.rglob("*.cpp")) if path != BINDINGS)
"""What every program is linked with: all but the Python module."""
FLAGS = ("-std=c++17", "-g1", "-pthread", "-Wall", "-Wextra", "-Werror")
"""With line numbers, and no more for debuggers: under sanitizers that takes twice as long to compile."""
SANITIZERS = {
    "thread": ("-O1", "-fsanitize=thread"),
    "address and undefined": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}
CHECKED = SANITIZERS["address and undefined"]
"""For programs that are compiled once: what they do is checked on the way, and the objects are those of other tests."""
BOUND = 300.0
"""Seconds after which a compiler counts as hung."""


def need(program: str, package: str) -> None:
    """Skips the test where `program`, of a Debian package, is not installed."""
    if shutil.which(program) is None:
        pytest.skip(f"needs {program} (Debian package {package})")


def without_preload() -> dict[str, str]:
    """The environment for a program with AddressSanitizer, which must be the first library that is loaded.

    vLLM's CPU build preloads libraries into what its process starts.
    """
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def compile_with(*command: str | Path) -> None:
    """Runs a compiler; what it complains of fails the test."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stderr[-4000:]


class Programs:
    """What was compiled in this test run, in `folder`, which exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def link(self, main: str, *flags: str, compiler: str = "g++") -> Path:
        """The program of `main`, a source beside this file, and `RUNTIME`."""
        command = (compiler, *FLAGS, *flags)
        sources = (*RUNTIME, HERE / main)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: self._once(*command, "-c", source), sources))
        return self._once(*command, *objects, "-ldl")

    def libibverbs(self, source: str) -> Path:
        """The folder, for LD_LIBRARY_PATH, with a libibverbs made of a source beside this file. It has no sanitizer."""
        return self._library(source, "libibverbs.so.1")

    def libcuda(self) -> Path:
        """The same with the libcuda of cuda_in_memory.cpp."""
        return self._library("cuda_in_memory.cpp", "libcuda.so.1")

    def _library(self, source: str, name: str) -> Path:
        folder = self._folder / Path(source).stem
        folder.mkdir(exist_ok=True)
        # With its own name inside: one that is loaded already is taken in the place of the machine's.
        self._make(folder / name, "g++", *FLAGS, "-O2", "-shared", "-fPIC", f"-Wl,-soname,{name}", HERE / source)
        return folder

    def _once(self, *command: str | Path) -> Path:
        """What `command` makes; it is run if this is the first time that it is asked for."""
        name = hashlib.sha256("\0".join(map(str, command)).encode()).hexdigest()[:32]
        return self._make(self._folder / name, *command)

    def _make(self, target: Path, *command: str | Path) -> Path:
        with _locked(target.with_name(f"{target.name}.lock")):
            if not target.exists():
                unfinished = target.with_name(f"{target.name}.unfinished")
                compile_with(*command, "-o", unfinished)
                unfinished.rename(target)
        return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other workers and threads from making the same thing; the kernel unlocks it if this process ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
