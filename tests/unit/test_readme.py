"""README.md and docs/trace.md: their commands have options that exist, and its tables name what there is."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from vllm_spark.cli import COMMANDS, _load
from vllm_spark.config.settings import SparkConfig, serve_flag, side_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TRACE = (ROOT / "docs" / "trace.md").read_text()
VALUES = {"ADDRESS": "10.0.0.1", "PORT": "29650"}
"""Values for placeholders of options that check their values."""


def commands(program: str, text: str = README) -> list[str]:
    """The commands of a text that start `program`, in blocks and between words, without their comments."""
    blocks = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    inline = [" ".join(each.split()) for each in re.findall(r"`([^`]+)`", text)]
    found = []
    for line in [*blocks, *inline]:
        line = line.removeprefix("ExecStart=%h/vllm/bin/")
        command = re.split(r"\s+#|\s\|\s", line)[0]
        if command.startswith(f"{program} ") and "..." not in command:
            found.append(command)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", list(dict.fromkeys((*commands("vllm-spark"), *commands("vllm-spark", TRACE)))))
def test_a_command_of_the_documentation_is_accepted(command: str) -> None:
    name, *words = [VALUES.get(word, word) for word in shlex.split(command)[1:]]
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False, exit_on_error=False)
    _load(name).add_arguments(parser)
    if words != ["--help"]:
        parser.parse_args(words)


def test_the_first_commands_name_the_addresses() -> None:
    """On a GB10 they are needed: the machines have RDMA interfaces with addresses."""
    assert commands("vllm-spark")[0] == "vllm-spark join --leader 10.0.0.1"
    assert commands("vllm serve")[0] == "vllm serve MODEL --spark --spark-address 10.0.0.1"


def test_every_flag_of_vllm_serve_in_readme_exists() -> None:
    flags = {serve_flag(name) for name in SparkConfig.model_fields if side_of(name) != "follower"}
    named = set(re.findall(r"--spark-[a-z-]*[a-z]", README + TRACE))
    assert named - flags == set()
    assert named


def test_the_table_of_commands_is_complete() -> None:
    table = README.partition("\n## Commands\n")[2].partition("\n## ")[0]
    assert {row.split()[0] for row in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)} == set(COMMANDS)
