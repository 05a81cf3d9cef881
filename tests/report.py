"""Pages of docs/ that tests make: rows that they record when they pass, and a table of them; nothing is typed by hand.

Each passed test adds its row to the file that a page's variable names. A page's own module, run as a program with such
files, adds their rows to those that are kept, where a row replaces the one with the same key, and writes the page.

This module imports neither vLLM nor torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

DOCS = Path(__file__).parents[1] / "docs"

EQUAL, STOCK_LIMIT, LIMIT = "equal", "stock's limit", "limit"
"""The first words of a result: the pair's answers are stock's; stock vLLM cannot do it there; `--spark` cannot."""

CPU = "CPU"


@dataclass(frozen=True)
class Row:
    """One thing that was compared with stock vLLM. The classes of the pages add what it was.

    Attributes:
        vllm: the version, without the build's name.
        where: `CPU`, "two GPUs" and the like.
        result: `EQUAL`, `STOCK_LIMIT` or `LIMIT`; then what was counted or the reason, after a colon.
    """

    vllm: str
    where: str
    result: str

    @property
    def kind(self) -> str:
        """The first word of the result."""
        return self.result.partition(":")[0]

    @property
    def key(self) -> tuple[str, ...]:
        """What distinguishes rows; another result with the same key replaces this one."""
        raise NotImplementedError


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Page(Generic[R]):
    """A page, and where its rows are.

    Attributes:
        row: the class of its rows.
        variable: the environment variable that names the file to which tests add rows.
        rows: the file with the rows of the page.
        file: the page.
        head: its text before the tables.
        columns: names of the fields of `row` in the order of the table, and their headings.
    """

    row: type[R]
    variable: str
    rows: Path
    file: Path
    head: str
    columns: dict[str, str]

    def record(self, row: R) -> None:
        """Adds a row to the file that the variable names, if it is set.

        Raises:
            ValueError: the result begins with none of the three words.
        """
        if row.kind not in (EQUAL, STOCK_LIMIT, LIMIT):
            raise ValueError(
                f"the result {row.result!r} is invalid: must begin with {EQUAL!r}, {STOCK_LIMIT!r} or {LIMIT!r}"
            )
        if file := os.environ.get(self.variable):
            with Path(file).open("a", encoding="utf-8") as output:
                output.write(self._line_of_json(row))

    def read_rows(self, files: Iterable[Path]) -> list[R]:
        """The rows of files, sorted; a later one replaces an earlier one with the same key."""
        lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
        by_key = {row.key: row for row in (self.row(**json.loads(line)) for line in lines)}
        return [by_key[key] for key in sorted(by_key)]

    def render(self, rows: Sequence[R]) -> str:
        """The page of these rows."""
        counts = Counter((row.where, row.vllm, row.kind) for row in rows)
        lines = [*_heading("where", "vLLM", "result", "rows")]
        lines += [_line((*key, str(count))) for key, count in sorted(counts.items())]
        lines += ["", *_heading(*self.columns.values())]
        lines += [_line([getattr(row, name) for name in self.columns]) for row in rows]
        return self.head + "\n".join(lines) + "\n"

    def update(self) -> None:
        """Adds the rows of the command line's files to `rows`, and writes the page."""
        rows = self.read_rows([self.rows, *map(Path, sys.argv[1:])])
        self.rows.write_text("".join(map(self._line_of_json, rows)), encoding="utf-8")
        self.file.write_text(self.render(rows), encoding="utf-8")

    def _line_of_json(self, row: R) -> str:
        fields: dict[str, Any] = asdict(row)
        return json.dumps({name: fields[name] for name in self.columns}, ensure_ascii=False) + "\n"


def vllm_version() -> str:
    """That of the vLLM that is tested."""
    return version("vllm").partition("+")[0]


def _heading(*names: str) -> tuple[str, str]:
    return _line(names), _line(["---"] * len(names))


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("\n", " ") for cell in cells)
    return f"| {' | '.join(escaped)} |"
