"""The table of docs/models.md, from what test runs have recorded.

    VLLMSPARK_MODELS_REPORT=rows.jsonl pytest tests/models
    python -m tests.models.report rows.jsonl [MORE.jsonl ...] > docs/models.md

Each passed test adds a line; a later line for the same architecture, machine and vLLM replaces an earlier one.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from .architectures import Architecture

VARIABLE = "VLLMSPARK_MODELS_REPORT"

HEAD = """# Models

Made by `tests/models` (`python -m tests.models.report`), from tests that passed; nothing here is written by hand. Each
row is a tiny random checkpoint of that architecture, served by one rank of stock vLLM and by a pair: "equal" means that
all greedy tokens are, and that no collective went past this project's runtime.

| architecture | class | weights | vLLM | where | result |
| --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """One architecture on one kind of machine with one version of vLLM."""

    name: str
    model: str
    dtype: str
    vllm: str
    where: str
    result: str


def record(name: str, architecture: Architecture, result: str) -> None:
    """Adds a row to the file that `VARIABLE` names, if it is set."""
    file = os.environ.get(VARIABLE)
    if not file:
        return
    import vllm

    row = Row(name, architecture.model, architecture.dtype, vllm.__version__, "CPU", result)
    with Path(file).open("a", encoding="utf-8") as output:
        output.write(json.dumps(asdict(row)) + "\n")


def main() -> None:
    """Prints the page from the files of the command line."""
    rows: dict[tuple[str, str, str], Row] = {}
    for file in sys.argv[1:]:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            row = Row(**json.loads(line))
            rows[row.name, row.where, row.vllm] = row
    lines = [
        f"| {row.name} | `{row.model}` | {row.dtype} | {row.vllm} | {row.where} | {row.result} |"
        for _, row in sorted(rows.items())
    ]
    print(HEAD + "\n".join(lines))


if __name__ == "__main__":
    main()
