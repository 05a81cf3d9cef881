"""The report of `vllm-spark doctor`: a record, and how it is printed as text."""

from __future__ import annotations

import dataclasses
import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_spark.doctor.checks import MachineReport
from vllm_spark.doctor.finding import Finding, Status, exit_code, worst

AREAS = {
    "rdma": "RDMA devices",
    "link": "The link",
    "gpu": "GPU",
    "machine": "The machine",
    "software": "Software",
    "model": "The model",
    "pair": "Both together",
}
_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "not applicable": ("-", "dim"),
    "note": ("note", "cyan"),
    "unknown": ("?", "cyan"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "bold red"),
}
_INDENT = 10


@dataclasses.dataclass(frozen=True)
class Report:
    """All findings, as `--json` prints them; `pair` has those that need both machines."""

    worst: Status
    exit_code: int
    machine: MachineReport
    peer: MachineReport | None = None
    pair: list[Finding] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, machine: MachineReport, peer: MachineReport | None, pair: list[Finding]) -> Report:
        """A report with its overall status."""
        status = worst([*machine.findings, *(peer.findings if peer else []), *pair])
        return cls(status, exit_code(status), machine, peer, pair)


def show(report: Report, console: Console) -> None:
    """Prints each area with its findings, and explanation and remedy of each warning or problem."""
    machines = [report.machine] + ([report.peer] if report.peer else [])
    for area, title in AREAS.items():
        ids = dict.fromkeys(f.id for machine in machines for f in machine.findings if f.area == area)
        if not ids:
            continue
        console.print(Text(f"\n{title}", style="bold"))
        if report.peer is None:
            _list([finding for finding in report.machine.findings if finding.area == area], console)
        else:
            _side_by_side(list(ids), machines, console)
    if report.pair:
        console.print(Text(f"\n{AREAS['pair']}", style="bold"))
        _list(report.pair, console)
    console.print(Text(f"\n{_summary(report)}", style="bold"))
    if not report.pair and report.machine.rails:
        console.print(
            "Both machines side by side: vllm-spark join on one of them, vllm-spark doctor --peer on the other."
        )


def show_bare(console: Console) -> None:
    """Prints why a machine without RDMA device and GPU was not checked further."""
    console.print(
        "This machine has no RDMA device (nothing in /sys/class/infiniband) and no GPU (no /proc/driver/nvidia, and "
        "nvidia-smi fails). So it cannot be part of a pair of GB10 machines, and nothing else was checked."
    )
    console.print(
        "On this machine, `vllm-spark demo` runs both ranks over the loopback "
        "transport with a tiny model. It needs vLLM's CPU build."
    )


def _list(findings: list[Finding], console: Console) -> None:
    for finding in findings:
        _headline(finding, finding.title + (f": {finding.value}" if finding.value else ""), console)
        _explain(finding, console)


def _headline(finding: Finding, words: str, console: Console) -> None:
    mark, style = _MARKS[finding.status]
    line = Text(f"  {mark:<{_INDENT - 2}}", style=style)
    line.append(_wrapped(words, console), "bold" if _troubled(finding) else "default")
    console.print(line, soft_wrap=True)


def _side_by_side(ids: list[str], machines: list[MachineReport], console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=False)
    for position, machine in zip(("here", "there"), machines, strict=True):
        table.add_column(Text(f"{_plain(machine.host)} ({position})"), ratio=1, overflow="fold")
    found = [{finding.id: finding for finding in machine.findings} for machine in machines]
    for name in ids:
        title = next(findings[name].title for findings in found if name in findings)
        table.add_row(Text(f"  {title}"), *(_cell(findings.get(name)) for findings in found))
    console.print(table)
    for name in ids:
        printed = set()
        for machine, findings in zip(machines, found, strict=True):
            finding = findings.get(name)
            if finding is None or not _is_explained(finding) or (finding.explanation, finding.remedy) in printed:
                continue  # printed once, if both machines have the same problem
            printed.add((finding.explanation, finding.remedy))
            _headline(finding, f"{finding.title}, {machine.host}", console)
            _explain(finding, console)


def _cell(finding: Finding | None) -> Text:
    if finding is None:
        return Text("-", style="dim")
    mark, style = _MARKS[finding.status]
    return Text(mark, style=style).append(f" {_plain(finding.value)}" if finding.value else "", "default")


def _explain(finding: Finding, console: Console) -> None:
    if not _is_explained(finding):
        return
    if finding.explanation:
        console.print(Text(" " * _INDENT + _wrapped(finding.explanation, console)), soft_wrap=True)
    for line in finding.remedy.splitlines():
        # Not wrapped, so that it can be copied.
        console.print(Text(f"{' ' * _INDENT}> {_plain(line)}", style="green"), soft_wrap=True)


def _wrapped(words: str, console: Console) -> str:
    """Broken into lines that are indented, but for the first."""
    lines = textwrap.wrap(
        _plain(words), max(20, console.width - _INDENT), break_long_words=False, break_on_hyphens=False
    )
    return f"\n{' ' * _INDENT}".join(lines)


def _troubled(finding: Finding) -> bool:
    return finding.status not in ("ok", "not applicable")


def _is_explained(finding: Finding) -> bool:
    """Whether explanation and remedy are printed: also why a check without a value does not apply."""
    return _troubled(finding) or (finding.status == "not applicable" and not finding.value)


def _summary(report: Report) -> str:
    everything = [*report.machine.findings, *(report.peer.findings if report.peer else []), *report.pair]
    problems, warnings = (sum(finding.status == status for finding in everything) for status in ("problem", "warning"))
    if problems:
        rest = f" and {_count(warnings, 'warning')}" if warnings else ""
        return f"{_count(problems, 'problem')}{rest}: the pair does not work."
    if warnings:
        return f"{_count(warnings, 'warning')}: the pair works, but not at its best."
    return "All is well."


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _plain(text: str) -> str:
    """The text without control characters: parts of it come from the other machine."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
