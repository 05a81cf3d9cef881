"""The table of docs/models.md.

    VLLMSPARK_MODELS_REPORT=new.jsonl python -m pytest tests/models
    python -m tests.models.report new.jsonl [MORE.jsonl ...]

`tests.report` describes what both commands do. Without a file the second one writes the page alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.report import CPU, DOCS, EQUAL, LIMIT, STOCK_LIMIT, Page, Row, vllm_version

__all__ = ["CPU", "EQUAL", "LIMIT", "STOCK_LIMIT"]

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


@dataclass(frozen=True)
class ModelRow(Row):
    """One architecture in one format with one kind of speculation, by one version of vLLM on one kind of machine.

    Attributes:
        architecture: the family's name, as in `ARCHITECTURES`.
        model_class: the class that the checkpoint's configuration names.
        format: of the weights while they are served, such as "float32" or "GPTQ INT4".
        speculation: the method and the number of drafted tokens, or `NO_SPECULATION`.
    """

    architecture: str
    model_class: str
    format: str
    speculation: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.architecture, self.where, self.format, self.speculation, self.vllm, self.model_class


MODELS = Page(
    ModelRow,
    "VLLMSPARK_MODELS_REPORT",
    Path(__file__).with_name("rows.jsonl"),
    DOCS / "models.md",
    HEAD,
    {
        "architecture": "architecture",
        "model_class": "class",
        "format": "format",
        "speculation": "speculation",
        "vllm": "vLLM",
        "where": "where",
        "result": "result",
    },
)


def record(
    architecture: str,
    model_class: str,
    format: str,
    result: str,
    *,
    speculation: str = NO_SPECULATION,
    where: str = CPU,
) -> None:
    """Records a row of the installed vLLM; arguments as of `ModelRow`, error as of `Page.record`."""
    MODELS.record(ModelRow(vllm_version(), where, result, architecture, model_class, format, speculation))


if __name__ == "__main__":
    MODELS.update()
