"""The GPU's kernels as the compiler sees them: for GPUs that this machine need not have."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .ptx import Access, kernels, shared_accesses

SOURCE = Path(__file__).parents[2] / "csrc" / "kernels" / "collectives.cu"
ARCHITECTURES = ["90", "121"]
KERNEL_COUNT = 8
# Offsets in Rank (csrc/kernels/rank.hpp) of the pointers into memory that the peer, a proxy or the host uses too:
# both lanes, the abort word and the report. Not among them: 56, this rank's progress, in device memory.
SHARED_FIELDS = frozenset({0, 8, 16, 24, 32, 40, 48, 64})
MOST_REGISTERS = {"packets": 64, "payload": 128}  # 544 and 512 threads must fit a multiprocessor's 65,536

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, CUDA's compiler, is not on this machine")


def compile_to(kind: str, architecture: str, target: Path, *options: str) -> str:
    """Compiles every kernel and returns what the compiler printed."""
    command = ["nvcc", "-std=c++17", "-O3", f"-{kind}", *options, "-o", str(target), str(SOURCE)]
    command.insert(1, f"-arch={'compute' if kind == 'ptx' else 'sm'}_{architecture}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module", params=ARCHITECTURES)
def ptx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    compile_to("ptx", request.param, target)
    return target.read_text()


def all_shared_accesses(ptx: str) -> list[Access]:
    return [access for name, body in kernels(ptx) for access in shared_accesses(name, body, SHARED_FIELDS)]


def test_shared_memory_is_accessed_at_system_scope_only(ptx: str) -> None:
    by_kernel = {name: shared_accesses(name, body, SHARED_FIELDS) for name, body in kernels(ptx)}
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers(architecture: str, tmp_path: Path) -> None:
    printed = compile_to("cubin", architecture, tmp_path / "kernels.cubin", "-Xptxas", "-v")
    found = re.findall(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        printed,
        re.DOTALL,
    )
    assert len(found) == KERNEL_COUNT
    for name, stores, loads, registers in found:
        most = MOST_REGISTERS["packets" if "packets" in name else "payload"]
        assert (int(stores), int(loads)) == (0, 0), f"{name} spills registers"
        assert int(registers) <= most, f"{name} uses {registers} registers"
