"""Finds, in the PTX of a kernel, every access to the memory that ranks share, and tells which are not system-scope.

A small data-flow analysis: which registers hold addresses that were made from given fields of a kernel parameter.
Loops need no care, since compiled PTX assigns each register for one purpose, and a register once tainted stays so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_KERNEL = re.compile(r"\.entry\s+(\w+)\s*\(.*?^\{(.*?)^\}", re.DOTALL | re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)(?:\s+(.*?))?;", re.MULTILINE)
_REGISTER = re.compile(r"%rd\d+")
_MEMORY = re.compile(r"\[(%rd\d+|\w+)([+-]+\d+)?\]")
_ACCESSES = ("ld", "st", "atom", "red")


@dataclass(frozen=True)
class Access:
    """One access to shared memory."""

    kernel: str
    instruction: str

    @property
    def is_system_scope(self) -> bool:
        """True if it is ordered or coherent with accesses of CPUs and devices."""
        return ".sys" in self.instruction.split()[0]


def kernels(ptx: str) -> Iterator[tuple[str, str]]:
    """Each kernel's name and body."""
    for match in _KERNEL.finditer(ptx):
        yield match.group(1), match.group(2)


def instructions(body: str) -> list[tuple[str, str]]:
    """Each instruction of a kernel's body and its operands."""
    return [(match.group(1), match.group(2) or "") for match in _INSTRUCTION.finditer(body)]


def shared_accesses(kernel: str, body: str, fields: frozenset[int]) -> list[Access]:
    """Accesses through pointers made from the 8-byte fields at offsets `fields` of the kernel's first parameter."""
    listed = instructions(body)
    parameter = f"{kernel}_param_0"
    bases: dict[str, int] = {parameter: 0}  # what holds the parameter's own address, and how far from its start
    tainted: set[str] = set()
    before = -1
    while before != len(tainted) + len(bases):
        before = len(tainted) + len(bases)
        for name, operands in listed:
            target, _, sources = operands.partition(",")
            if name.startswith("ld.param"):
                _taint_loaded(name, operands, bases, tainted, fields)
            elif not name.startswith(_ACCESSES):
                _follow(name, target.strip(), sources, bases, tainted)
    return [
        Access(kernel, f"{name} {operands}")
        for name, operands in listed
        if name.startswith(_ACCESSES)
        and not name.startswith(("ld.param", "ld.local", "st.local"))
        and any(match.group(1) in tainted for match in _MEMORY.finditer(operands))
    ]


def _taint_loaded(name: str, operands: str, bases: dict[str, int], tainted: set[str], fields: frozenset[int]) -> None:
    memory = _MEMORY.search(operands)
    if memory is None or memory.group(1) not in bases or (".u64" not in name and ".b64" not in name):
        return
    offset = bases[memory.group(1)] + _number(memory.group(2))
    for position, register in enumerate(_REGISTER.findall(operands.partition("[")[0])):
        if offset + 8 * position in fields:
            tainted.add(register)


def _follow(name: str, target: str, sources: str, bases: dict[str, int], tainted: set[str]) -> None:
    words = [word.strip() for word in sources.split(",")]
    if name.startswith("mov") and words[0] in bases:
        bases.setdefault(target, bases[words[0]])
    elif name.startswith("add") and words[0] in bases and re.fullmatch(r"-?\d+", words[1]):
        bases.setdefault(target, bases[words[0]] + int(words[1]))
    elif _REGISTER.fullmatch(target) and any(register in tainted for register in _REGISTER.findall(sources)):
        tainted.add(target)


def _number(text: str | None) -> int:
    return 0 if text is None else int(text.replace("+", "") or 0)
