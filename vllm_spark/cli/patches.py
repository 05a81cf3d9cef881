"""`vllm-spark patches`: what this project changes in vLLM, and whether it fits the installed one."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from vllm_spark.compat import SUPPORTED, vllm_version
from vllm_spark.patches import all_patches, state_of

SUMMARY = "show every change to vLLM that --spark needs, and its state"

_FITS = ("ready", "applied")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints each patch with its state. Returns 0 if all fit the installed vLLM, 1 if not."""
    console = Console(highlight=False)
    console.print(f"vLLM {vllm_version() or 'not installed'} (this version works with {SUPPORTED})")
    states = []
    for patch in all_patches():
        states.append(state_of(patch))
        console.print(f"\n[bold]{patch.name}[/bold]: [{'green' if states[-1] in _FITS else 'red'}]{states[-1]}[/]")
        details = Table.grid(padding=(0, 2))
        details.add_row("  replaces", f"{patch.anchor.module}:{patch.anchor.qualified_name}")
        details.add_row("  gives", patch.feature)
        details.add_row("  no hook serves", f"because {patch.reason}")
        console.print(details)
    return 0 if all(state in _FITS for state in states) else 1
