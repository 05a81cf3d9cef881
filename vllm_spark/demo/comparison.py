"""The comparison of the pair with one rank."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from vllm_spark.demo.counters import Counters


@dataclass(frozen=True)
class Run:
    """The results of one server: its token ids for each prompt, and its times in seconds."""

    tokens: list[list[int]]
    start_seconds: float
    token_seconds: float
    ranks: tuple[Counters, ...] = ()


@dataclass(frozen=True)
class Summary:
    """The result as `--json` prints it; `all_reduces` and `all_gathers` are those of rank 0."""

    ok: bool
    tokens: int
    identical: bool
    all_reduces: int
    all_gathers: int
    fallbacks: int
    seconds: float

    @classmethod
    def of(cls, pair: Run, single: Run, seconds: float) -> Summary:
        """Summarizes both runs, which took `seconds` in total."""
        rank0, rank1 = pair.ranks
        identical = pair.tokens == single.tokens
        fallbacks = rank0.fallbacks + rank1.fallbacks
        return cls(
            ok=identical and min(rank0.all_reduces, rank1.all_reduces) > 0 and fallbacks == 0,
            tokens=sum(map(len, pair.tokens)),
            identical=identical,
            all_reduces=rank0.all_reduces,
            all_gathers=rank0.all_gathers,
            fallbacks=fallbacks,
            seconds=round(seconds, 1),
        )


def as_table(pair: Run, single: Run) -> Table:
    """Both runs side by side."""
    table = Table("", "the pair", "one rank", title="Two ranks against one")
    for column in table.columns[1:]:
        column.justify = "right"

    def both(name: str) -> str:
        return " / ".join(f"{getattr(rank, name):,}" for rank in pair.ranks)

    table.add_row("ranks", str(len(pair.ranks)), "1")
    table.add_row("tokens compared", str(sum(map(len, pair.tokens))), str(sum(map(len, single.tokens))))
    table.add_row("seconds to start", f"{pair.start_seconds:.1f}", f"{single.start_seconds:.1f}")
    table.add_row("seconds for the tokens", f"{pair.token_seconds:.1f}", f"{single.token_seconds:.1f}")
    table.add_section()
    table.add_row("all-reduces, rank 0 / rank 1", both("all_reduces"), "")
    table.add_row("bytes all-reduced", both("all_reduce_bytes"), "")
    table.add_row("all-gathers", both("all_gathers"), "")
    table.add_row("bytes all-gathered", both("all_gather_bytes"), "")
    table.add_row("with vLLM's own path", both("fallbacks"), "")
    return table


def first_difference(pair: list[list[int]], single: list[list[int]]) -> str:
    """The first difference between the token ids for the same prompts, which must differ, as text."""
    for number, (ours, theirs) in enumerate(zip(pair, single, strict=True), start=1):
        for position, (our_token, their_token) in enumerate(zip(ours, theirs, strict=False), start=1):
            if our_token != their_token:
                return f"answer {number}, token {position} is {our_token} on the pair, {their_token} on one rank."
        if len(ours) != len(theirs):
            return f"answer {number} has {len(ours)} tokens on the pair, {len(theirs)} on one rank."
    raise AssertionError("equal answers have no difference")
