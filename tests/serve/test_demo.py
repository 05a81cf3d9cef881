"""`vllm-spark demo` as a person runs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from vllm_spark.processes.managed import clean_environment, program

from . import shared_memory
from .hosts import Host
from .process import assert_all_gone


def test_the_outcome_for_programs(host: Host, short_folder: Path) -> None:
    """`--json`: one object on standard output, all else on standard error, and nothing is left."""
    shared_before = shared_memory.listing(host)
    answer = short_folder / "answer.json"
    # A shell, to have standard output apart from the log.
    command = ["/bin/sh", "-c", 'exec "$0" demo --json --max-tokens 8 > "$1"', program("vllm-spark"), str(answer)]
    demo = host.popen(command, {"TMPDIR": str(short_folder)}, "vllm-spark demo")
    try:
        assert demo.wait(500) == 0, demo.tail()
    finally:
        demo.terminate()
    (line,) = answer.read_text().splitlines()
    outcome = json.loads(line)
    assert outcome.keys() == {"ok", "tokens", "identical", "all_reduces", "all_gathers", "fallbacks", "seconds"}
    assert outcome["ok"] is outcome["identical"] is True
    assert outcome["fallbacks"] == 0
    assert outcome["tokens"] == 7 * 8, "eight for each prompt"
    assert outcome["all_gathers"] >= outcome["tokens"], "one for each token at least: the answers came one by one"
    assert outcome["all_reduces"] >= 9 * outcome["tokens"], "nine in each forward of the tiny model"
    assert outcome["seconds"] > 0
    assert_all_gone(demo)
    assert [path.name for path in short_folder.iterdir() if path.name.startswith("vllm-spark-")] == []
    shared_memory.assert_as_before(shared_before, hosts=[host])


def test_bad_input(short_folder: Path) -> None:
    result = subprocess.run(
        [program("vllm-spark"), "demo", "--json", "--max-tokens", "0"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert "'0' is not a number above 0" in result.stderr
    assert "Traceback" not in result.stderr
