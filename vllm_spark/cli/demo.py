"""`vllm-spark demo`: a pair on one machine, with a tiny model and two real processes over loopback."""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import asdict
from typing import get_args

from rich.console import Console

from vllm_spark.cli.arguments import up_to, user_path, words
from vllm_spark.compat.versions import installed_vllm, is_cpu_build
from vllm_spark.errors import ConfigurationError, SparkError
from vllm_spark.models.tiny import ModelKind

SUMMARY = "run a pair on this machine: a tiny model on two ranks over loopback, compared with one rank"

NEEDED = ("openai", "safetensors", "tokenizers", "torch", "prometheus_client")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark demo`."""
    kinds = get_args(ModelKind)
    parser.add_argument(
        "--model-kind", choices=kinds, default="moe", help="tiny Qwen3-MoE or tiny Qwen3 (default: moe)"
    )
    parser.add_argument(
        "--prompt", type=words, default="What joins two desks?", help="the chat question (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens",
        type=up_to(512, int),
        default=32,
        metavar="N",
        help="length of every answer, at most 512 (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=up_to(86400),
        default=900.0,
        metavar="SECONDS",
        help="give up after this time (default: %(default)g)",
    )
    parser.add_argument(
        "--keep-logs", type=user_path, metavar="DIR", help="write the servers' output there and keep it"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object to standard output, all else to standard error"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 0 if two ranks gave the token ids of one, 1 if not.

    Raises:
        SparkError: it could not be shown; the processes are ended and the logs kept.
    """
    from vllm_spark.demo.show import Demo, Settings
    from vllm_spark.processes.group import process_group

    console = Console(stderr=args.json, highlight=False)
    try:
        _check_installation()
        with process_group("demo", console, args.keep_logs) as programs:
            settings = Settings(args.model_kind, args.prompt, args.max_tokens, args.timeout)
            summary = Demo(settings, console, programs).run()
    except SparkError as error:
        if args.json:
            print(json.dumps({"ok": False, "error": str(error)}), flush=True)
        raise
    if args.json:
        print(json.dumps(asdict(summary)), flush=True)
    return 0 if summary.ok else 1


def _check_installation() -> None:
    """Checks what the demo needs, before anything is started.

    Raises:
        ConfigurationError: vLLM's CPU build, or a package of the extra `demo`, is not installed.
    """
    version = installed_vllm()
    if version is None:
        raise ConfigurationError(
            "vLLM is not installed for this Python; `make demo` in the source tree installs its CPU build"
        )
    if not is_cpu_build():
        raise ConfigurationError(
            f"the demo runs two ranks on one machine, which needs vLLM's CPU build, and this is vllm {version}; "
            "`make demo` in the source tree installs the CPU build into a separate environment"
        )
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ConfigurationError(
                f"the demo needs the package {package}; install it with: pip install {package.replace('_', '-')}"
            )
