"""How many instructions of ours one posted message costs the proxy, outside the driver."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MESSAGES = 1000
LIMIT = 250
"""Instructions for one message: at 3 GHz and one a cycle 0.08 us, little beside the 3 us of the wire."""


def compile_with(*arguments: str) -> None:
    done = subprocess.run(["g++", "-std=c++17", "-O3", "-g", "-pthread", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None or shutil.which("valgrind") is None:
        pytest.skip("needs g++ and valgrind (Debian packages)")
    folder = tmp_path_factory.mktemp("proxy_cost")
    compile_with("-shared", "-fPIC", str(HERE / "verbs_in_memory.cpp"), "-o", str(folder / "libibverbs.so.1"))
    sources = [str(path) for path in sorted((ROOT / "csrc").rglob("*.cpp")) if "device" not in path.parts[-2:-1]]
    sources = [path for path in sources if not path.endswith("bindings.cpp")]
    compile_with(*sources, str(HERE / "proxy_cost.cpp"), "-ldl", "-o", str(folder / "proxy_cost"))
    return folder / "proxy_cost"


def own_instructions(profile: Path) -> Counter[str]:
    """Instructions by the object that they are in, from what callgrind wrote (its manual describes the format)."""
    names: dict[str, str] = {}
    costs: Counter[str] = Counter()
    current, inclusive = "", False
    for line in profile.read_text().splitlines():
        if match := re.match(r"ob=(\(\d+\))(?: (.*))?$", line):
            names.setdefault(match[1], match[2] or "")
            current = names[match[1]]
        elif match := re.match(r"cob=(\(\d+\)) (.*)$", line):
            names.setdefault(match[1], match[2])
        elif line.startswith("calls="):
            inclusive = True  # the next line has the cost of what was called, which has lines of its own
        elif match := re.match(r"[+*-]?\d* (\d+)$", line):
            if not inclusive:
                costs[Path(current).name] += int(match[1])
            inclusive = False
    return costs


@pytest.mark.parametrize("kind", ["packets", "payload"])
def test_a_posted_message_costs_few_instructions(program: Path, kind: str, tmp_path: Path) -> None:
    profile = tmp_path / "callgrind.out"
    done = subprocess.run(
        [
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}", "--collect-atstart=no"),
            "--toggle-collect=spark::Proxy::post(unsigned int)",
            *(str(program), kind, str(MESSAGES)),
        ],
        env={"LD_LIBRARY_PATH": str(program.parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    costs = own_instructions(profile)
    assert costs["libibverbs.so.1"] > MESSAGES, f"the driver was called: {costs}"
    ours = (sum(costs.values()) - costs["libibverbs.so.1"] - costs["libc.so.6"]) / MESSAGES
    print(f"{kind}: {ours:.0f} instructions for a message; by object {dict(costs)}")
    assert 20 < ours <= LIMIT
