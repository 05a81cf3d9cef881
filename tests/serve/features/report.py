"""The table of docs/features.md.

    VLLMSPARK_THOROUGH=1 VLLMSPARK_FEATURES_REPORT=new.jsonl python -m pytest tests/serve
    python -m tests.serve.features.report new.jsonl [MORE.jsonl ...]

`tests.report` describes what both commands do. Without a file the second one writes the page alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.report import CPU, DOCS, EQUAL, LIMIT, STOCK_LIMIT, Page, Row, vllm_version

__all__ = ["EQUAL", "LIMIT", "STOCK_LIMIT"]

ONE_RANK, TWO_RANKS = "one rank", "two ranks"

HEAD = f"""# Features

`python -m tests.serve.features.report` writes this page from rows that the tests of `tests/serve` recorded when they
passed ([testing.md](testing.md#features-and-what-they-are-compared-with)). In each row the same was asked of stock vLLM
and of a pair, with a tiny random model in float32. Embeddings, scores, rewards and speculation are in
[models.md](models.md). The results:

- **{EQUAL}**: the pair's answers are those of stock vLLM: tokens, probabilities, and what the API has around them;
- **{STOCK_LIMIT}**: stock vLLM cannot do it there without this project either;
- **{LIMIT}**: stock vLLM does it, `--spark` does not.

"""


@dataclass(frozen=True)
class FeatureRow(Row):
    """One thing that was asked of both.

    Attributes:
        feature: of vLLM.
        asked: what was asked.
        stock: how many ranks of stock vLLM it was compared with.
    """

    feature: str
    asked: str
    stock: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.feature, self.asked, self.where, self.vllm


FEATURES = Page(
    FeatureRow,
    "VLLMSPARK_FEATURES_REPORT",
    Path(__file__).with_name("rows.jsonl"),
    DOCS / "features.md",
    HEAD,
    {
        "feature": "feature",
        "asked": "asked",
        "stock": "stock vLLM",
        "vllm": "vLLM",
        "where": "where",
        "result": "result",
    },
)


def record(feature: str, asked: str, result: str = EQUAL, *, stock: str = TWO_RANKS) -> None:
    """Records a row of the installed vLLM; arguments as of `FeatureRow`, error as of `Page.record`."""
    FEATURES.record(FeatureRow(vllm_version(), CPU, result, feature, asked, stock))


if __name__ == "__main__":
    FEATURES.update()
