"""How many instructions of ours a message costs the proxy, outside the driver."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from .programs import Programs, need

MESSAGES = 1000
DOORBELL = ("spark::Doorbell::post(spark::Transport&, unsigned int)", "spark::verbs::Retransmission::flush()")
SCANNER = ("spark::SlotScanner::post_staged(spark::Transport&)",)
LIMITS = {
    "doorbell-packets": (DOORBELL, 350),
    "doorbell-payload": (DOORBELL, 390),
    "packets": (SCANNER, 5300),
    "payload": (SCANNER, 3500),
}
"""For each kind of message of proxy_cost.cpp, the functions that post it, and the most instructions, 10 % more than
measured. A GPU's packets are 855, five instructions each; its payload is eight pieces of two requests each. At 3 GHz
and two a cycle, 5,000 instructions take 0.8 us, beside 3.3 us of the wire."""


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


@pytest.mark.thorough
@pytest.mark.parametrize("kind", LIMITS)
def test_a_posted_message_costs_few_instructions(programs: Programs, kind: str, tmp_path: Path) -> None:
    need("valgrind", "valgrind")
    functions, limit = LIMITS[kind]
    program = programs.link("proxy_cost.cpp", "-O3")
    driver = programs.libibverbs("verbs_in_memory.cpp")
    profile = tmp_path / "callgrind.out"
    done = subprocess.run(
        [
            *("valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}", "--collect-atstart=no"),
            *(f"--toggle-collect={function}" for function in functions),
            *(str(program), kind, str(MESSAGES)),
        ],
        env={"LD_LIBRARY_PATH": str(driver), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    costs = own_instructions(profile)
    assert costs["libibverbs.so.1"] > MESSAGES, f"the driver was called: {costs}"
    ours = (sum(costs.values()) - costs["libibverbs.so.1"] - costs["libc.so.6"]) / MESSAGES
    print(f"{kind}: {ours:.0f} instructions for a message; by object {dict(costs)}")
    assert 20 < ours <= limit
