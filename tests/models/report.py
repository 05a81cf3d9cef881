"""The table of docs/models.md, from what tests have recorded; nothing in it is written by hand.

    VLLMSPARK_MODELS_REPORT=new.jsonl python -m pytest tests/models
    python -m tests.models.report new.jsonl [MORE.jsonl ...]

Each passed test of tests/models adds its row to the file that `VARIABLE` names. The second command adds the rows of
such files to `ROWS`, where a row replaces the one of the same architecture, format, speculation, vLLM and machine, and
writes the page. Without a file it writes the page alone.

This module imports neither vLLM nor torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from importlib.metadata import version
from pathlib import Path

VARIABLE = "VLLMSPARK_MODELS_REPORT"
ROWS = Path(__file__).with_name("rows.jsonl")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"

EQUAL, STOCK_LIMIT, LIMIT = "equal", "stock's limit", "limit"
"""The first words of a result: the pair's answers are stock's; stock vLLM cannot do it there; `--spark` cannot."""

CPU = "CPU"
NO_SPECULATION = "-"

HEAD = f"""# Models

`python -m tests.models.report` writes this page from rows that the tests of `tests/models` and `tests/gpu` recorded
when they passed ([testing.md](testing.md#models-and-what-they-are-compared-with)). Each row is a tiny random checkpoint
of an architecture, served by stock vLLM and by a pair. The results:

- **{EQUAL}**: all greedy tokens and the logarithms of their probabilities (or embeddings, scores and rewards) of the
  pair are those of stock vLLM on two ranks, to the last bit, unless the row names another reference; and every
  collective went through this project's runtime;
- **{STOCK_LIMIT}**: stock vLLM cannot serve it there without this project either, with the message that is named;
- **{LIMIT}**: stock vLLM serves it on two ranks, `--spark` does not.

"""
TABLE_HEAD = """
| architecture | class | format | speculation | vLLM | where | result |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """One architecture in one format with one kind of speculation, by one version of vLLM on one kind of machine.

    Attributes:
        architecture: the family's name, as in `ARCHITECTURES`.
        model_class: the class that the checkpoint's configuration names.
        format: of the weights while they are served, such as "float32" or "GPTQ INT4".
        speculation: the method and the number of drafted tokens, or `NO_SPECULATION`.
        vllm: the version, without the build's name.
        where: `CPU`, "two GPUs" and the like.
        result: `EQUAL`, `STOCK_LIMIT` or `LIMIT`; then what was counted or the reason, after a colon.
    """

    architecture: str
    model_class: str
    format: str
    speculation: str
    vllm: str
    where: str
    result: str

    @property
    def kind(self) -> str:
        """The first word of the result."""
        return self.result.partition(":")[0]

    @property
    def key(self) -> tuple[str, ...]:
        """What tells rows apart; another result with the same key replaces this one."""
        return self.architecture, self.where, self.format, self.speculation, self.vllm, self.model_class


def record(
    architecture: str,
    model_class: str,
    format: str,
    result: str,
    *,
    speculation: str = NO_SPECULATION,
    where: str = CPU,
) -> None:
    """Adds a row to the file that `VARIABLE` names, if it is set; the arguments are those of `Row`.

    Raises:
        ValueError: the result begins with none of the three words.
    """
    vllm = version("vllm").partition("+")[0]
    row = Row(architecture, model_class, format, speculation, vllm, where, result)
    if row.kind not in (EQUAL, STOCK_LIMIT, LIMIT):
        raise ValueError(f"the result {result!r} is invalid: must begin with {EQUAL!r}, {STOCK_LIMIT!r} or {LIMIT!r}")
    file = os.environ.get(VARIABLE)
    if file:
        with Path(file).open("a", encoding="utf-8") as output:
            output.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


def read_rows(files: Iterable[Path]) -> list[Row]:
    """The rows of files, sorted; a later one replaces an earlier one with the same key."""
    rows = (Row(**json.loads(line)) for file in files for line in file.read_text(encoding="utf-8").splitlines())
    by_key = {row.key: row for row in rows}
    return [by_key[key] for key in sorted(by_key)]


def render(rows: Sequence[Row]) -> str:
    """The page of these rows."""
    counts = Counter((row.where, row.vllm, row.kind) for row in rows)
    lines = ["| where | vLLM | result | rows |", "| --- | --- | --- | --- |"]
    lines += [_line((*key, str(count))) for key, count in sorted(counts.items())]
    return HEAD + "\n".join(lines) + "\n" + TABLE_HEAD + "".join(_line(astuple(row)) + "\n" for row in rows)


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def main() -> None:
    """Adds the rows of the command line's files to `ROWS`, and writes the page."""
    rows = read_rows([ROWS, *map(Path, sys.argv[1:])])
    ROWS.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    PAGE.write_text(render(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
