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
    """Prints one row per patch. Returns 0 if all fit the installed vLLM, 1 if not."""
    table = Table(title=f"vLLM {vllm_version() or 'not installed'} (this version works with {SUPPORTED})")
    for column in ("patch", "replaces", "state", "without it", "why no hook serves"):
        table.add_column(column, overflow="fold")
    states = []
    for patch in all_patches():
        states.append(state_of(patch))
        table.add_row(
            patch.name, f"{patch.anchor.module}\n{patch.anchor.qualified_name}", states[-1], patch.feature, patch.reason
        )
    Console().print(table)
    return 0 if all(state in _FITS for state in states) else 1
