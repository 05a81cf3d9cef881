"""`vllm-spark patches`: this project's changes to vLLM, and whether they fit the installed version."""

from __future__ import annotations

import argparse
import textwrap

from rich.console import Console

from vllm_spark.compat.check import required_mismatches
from vllm_spark.compat.patching import all_patches, state_of
from vllm_spark.compat.versions import SUPPORTED, installed_vllm

SUMMARY = "show every change to vLLM that --spark makes, and whether it fits the installed version"

_FITS = ("ready", "applied")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints each patch with its state, and other differences of vLLM from the supported versions.

    Returns:
        0 if all fit the installed vLLM, 1 if not.
    """
    console = Console(highlight=False)
    console.print(f"vLLM {installed_vllm() or 'not installed'} (this version works with {SUPPORTED})")
    states = []
    for patch in all_patches():
        states.append(state_of(patch))
        need = "required" if patch.required else "optional"
        colour = "green" if states[-1] in _FITS else "red"
        console.print(f"\n[bold]{patch.name}[/bold] ({need}): [{colour}]{states[-1]}[/]")
        for label, text in (
            ("replaces", f"{patch.anchor.module}:{patch.anchor.qualified_name}"),
            ("gives", patch.feature),
            ("no hook serves", f"because {patch.reason}"),
        ):
            indent = " " * 18
            lines = textwrap.wrap(text, max(20, console.width - len(indent)), break_long_words=False)
            console.print(f"  {label:<16}" + f"\n{indent}".join(lines), soft_wrap=True)
    mismatches = required_mismatches() if installed_vllm() else ()
    for symbol, problem in mismatches:
        console.print(f"\n[red]--spark refuses to start[/]: {symbol} {problem}")
    return 0 if not mismatches and all(state in _FITS for state in states) else 1
