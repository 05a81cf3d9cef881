"""The GPU's kernels as the compiler sees them: for GPUs that this machine need not have."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .ptx import Access, instructions, kernels, shared_accesses

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "kernels" / "collectives.cu"
ARCHITECTURES = ["90", "121"]
"""Of which machine code ships."""
PTX_ARCHITECTURES = ["80", "90", "121"]
"""From which code is made: what ships as PTX, for GPUs without code of their own, and what machine code comes from."""
KERNEL_COUNT = 8
# Offsets in RankParameters (csrc/kernels/parameters.hpp) of the pointers into memory that the peer, a proxy or the
# host uses too: the slots of both directions, the abort word and the report. Not among them: 56, this rank's progress,
# in device memory.
SHARED_FIELDS = frozenset({0, 8, 16, 24, 32, 40, 48, 64})
MOST_REGISTERS = {"packets": 48, "payload": 96}
"""576 threads must fit a multiprocessor's 65,536; with fewer, the next kernel's blocks fit beside them."""
MOST_CODE = {"packets": 18 << 10, "payload": 29 << 10}
"""Bytes of a kernel: between two of them the model's weights pass through the caches, and it is fetched again. With the
tails of tensors inlined the payload kernels had 58 KB."""

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, CUDA's compiler, is not on this machine")


def compile_to(kind: str, architecture: str, target: Path, *options: str) -> str:
    """Compiles every kernel and returns what the compiler printed."""
    command = ["nvcc", "-std=c++17", "-O3", f"-{kind}", *options, "-o", str(target), str(SOURCE)]
    command.insert(1, f"-arch={'compute' if kind == 'ptx' else 'sm'}_{architecture}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=PTX_ARCHITECTURES)
def ptx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    compile_to("ptx", request.param, target)
    return target.read_text()


def collectives(ptx: str) -> list[tuple[str, str]]:
    """Names and bodies of the kernels; those that measure a machine are left out."""
    return [(name, body) for name, body in kernels(ptx) if not name.startswith("probe_")]


def test_what_measures_a_round_trip_is_at_system_scope(ptx: str) -> None:
    body = dict(kernels(ptx))["probe_round_trip"]
    accesses = [name for name, _ in instructions(body) if name.startswith(("ld", "st")) and "param" not in name]
    assert {"ld.acquire.sys.global.b64", "st.release.sys.global.b64"} == set(accesses)


def all_shared_accesses(ptx: str) -> list[Access]:
    return [access for name, body in collectives(ptx) for access in shared_accesses(name, body, SHARED_FIELDS)]


def test_shared_memory_is_accessed_at_system_scope_only(ptx: str) -> None:
    by_kernel = {name: shared_accesses(name, body, SHARED_FIELDS) for name, body in collectives(ptx)}
    assert len(by_kernel) == KERNEL_COUNT
    for name, accesses in by_kernel.items():
        loads = [access for access in accesses if access.instruction.startswith("ld")]
        stores = [access for access in accesses if access.instruction.startswith("st")]
        assert len(loads) >= 2, f"{name}: the peer's data and the abort word are loaded, if the analysis sees them"
        assert len(stores) >= 6, f"{name}: data, totals and failures are stored, if the analysis sees them"
        assert not [access for access in accesses if not access.is_system_scope], name


@pytest.mark.parametrize("weakened", ["ld.relaxed.sys", "st.relaxed.sys", "ld.acquire.sys", "st.release.sys"])
def test_a_weaker_access_would_be_noticed(ptx: str, weakened: str) -> None:
    planted = ptx.replace(weakened, weakened.partition(".")[0])
    names = {access.kernel for access in all_shared_accesses(planted) if not access.is_system_scope}
    assert len(names) == KERNEL_COUNT


def target(ptx: str) -> int:
    found = re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)
    assert found is not None
    return int(found.group(1))


def before_the_wait(body: str) -> list[str] | None:
    """What a kernel does to memory that others see, and where it branches, before griddepcontrol.wait; None if it never
    waits."""
    names = [name for name, _ in instructions(body)]
    if "griddepcontrol.wait" not in names:
        return None
    return [
        name
        for name in names[: names.index("griddepcontrol.wait")]
        if name.startswith(("ld", "st", "atom", "red", "bra"))
        and not name.startswith("ld.param")
        and ".shared" not in name  # a block's own
    ]


def test_every_kernel_waits_for_the_one_before_it(ptx: str) -> None:
    """The host starts kernels early on GPUs from 9.0 on: without this they would read what is not written yet."""
    early = {name: before_the_wait(body) for name, body in collectives(ptx)}
    assert len(early) == KERNEL_COUNT
    if target(ptx) >= 90:
        assert not any(names is None or names for names in early.values()), early
    else:
        assert early == dict.fromkeys(early, None), "there is no such instruction, and the host starts nothing early"


def test_what_ships_is_what_is_looked_at_here() -> None:
    """And no GPU from 9.0 on is left with PTX for less."""
    assert shipped("KERNEL_ARCHITECTURES") == ARCHITECTURES
    assert {*shipped("KERNEL_ARCHITECTURES"), *shipped("PTX_ARCHITECTURES")} == set(PTX_ARCHITECTURES)
    assert "90" in shipped("PTX_ARCHITECTURES")


def shipped(name: str) -> list[str]:
    """A constant of setup.py, which cannot be imported."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return list(ast.literal_eval(statement.value))
    raise AssertionError(f"setup.py has no {name}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_code(architecture: str, tmp_path: Path) -> None:
    cubin = tmp_path / "kernels.cubin"
    printed = compile_to("cubin", architecture, cubin, "-Xptxas", "-v")
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        printed,
        re.DOTALL,
    )
    found = [each for each in found if not each[0].startswith("probe_")]
    assert len(found) == KERNEL_COUNT
    for name, stores, loads, registers in found:
        kind = "packets" if "packets" in name else "payload"
        assert (int(stores), int(loads)) == (0, 0), f"{name} spills registers"
        assert int(registers) <= MOST_REGISTERS[kind], f"{name} uses {registers} registers"
        assert 1 << 10 < code_bytes(cubin)[name] <= MOST_CODE[kind], (
            f"{name} has {code_bytes(cubin)[name]} bytes of code"
        )


def code_bytes(cubin: Path) -> dict[str, int]:
    """Bytes of code of each kernel: the sizes of the sections `.text.KERNEL`."""
    sections = subprocess.run(["readelf", "-SW", str(cubin)], capture_output=True, text=True, timeout=60).stdout
    return {name: int(size, 16) for name, size in re.findall(r"\.text\.(\w+) +PROGBITS +\w+ \w+ (\w+)", sections)}
