"""The model of Marlin's times beside measurements: fitted to the journal of one GPU, tested on that of another.

    vllm-spark tune qwen3-30b-a3b-int4 --tp 1,2 --no-decode --output sweep      # on each GPU; more models, same folder
    python -m benchmarks.marlin_model h100/journal.jsonl h200/journal.jsonl [--plot FILE.png]

The search of `vllm-spark tune` measures every tile and number of blocks, and writes all of them to its journal. The
first journal is for the fit, the second for the test. Wanted: the model's first choice within 3 % of the best measured
one for at least 90 % of shapes and rows, and never more than 5 % slower than vLLM's default.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from benchmarks.marlin_times import Agreement, Constants, Measured, agreement, fit, predict
from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.marlin.table import MarlinShape
from vllm_spark.tune.results import MarlinOutcome
from vllm_spark.tune.search import CALLS
from vllm_spark.tune.timing import route

MULTIPROCESSORS = {"NVIDIA_GB10": 48, "NVIDIA_H100": 132, "NVIDIA_H200": 132}
CLOSE, PART, SLOWER = 0.03, 0.9, 0.05


def active_experts(shape: MarlinShape, rows: int) -> float:
    """Experts that have a token, mean over the routings of the search."""
    counts = [
        len(set(route(rows, shape.experts, shape.top_k, rows * 1000 + call)[1].flatten().tolist()))
        for call in range(CALLS)
    ]
    return statistics.mean(counts)


def read(journal: Path) -> tuple[str, list[MarlinOutcome]]:
    """The device, and the newest outcome of each shape and number of rows.

    Raises:
        ConfigurationError: the journal has no outcome of Marlin, or those of several devices.
    """
    found: dict[tuple[MarlinShape, int], MarlinOutcome] = {}
    devices = set()
    for line in journal.read_text(encoding="utf-8").splitlines():
        content = json.loads(line)
        if content.get("outcome", {}).get("kind") == "marlin" and content.get("stage", "searched") == "searched":
            outcome = TypeAdapter(MarlinOutcome).validate_python(content["outcome"])
            found[outcome.shape, outcome.rows] = outcome
            devices.add(content["device"])
    if len(devices) != 1:
        raise ConfigurationError(f"{journal} has outcomes of {len(devices)} devices; give one with those of one")
    return devices.pop(), list(found.values())


def measured(outcomes: Sequence[MarlinOutcome]) -> list[Measured]:
    """Every candidate's time."""
    return [
        Measured(outcome.shape, active_experts(outcome.shape, outcome.rows), parameters, ratio * outcome.default_us)
        for outcome in outcomes
        for parameters, ratio in outcome.tried
    ]


def multiprocessors(device: str) -> int:
    name = next((known for known in MULTIPROCESSORS if device.startswith(known)), None)
    if name is None:
        raise ConfigurationError(f"the multiprocessors of {device} are not known; add them to MULTIPROCESSORS")
    return MULTIPROCESSORS[name]


def compare(outcomes: Sequence[MarlinOutcome], device: str, constants: Constants) -> list[Agreement]:
    """The model's first choice for each shape and number of rows."""
    return [
        agreement(
            outcome.shape,
            outcome.rows,
            active_experts(outcome.shape, outcome.rows),
            dict(outcome.tried),
            multiprocessors(device),
            constants,
        )
        for outcome in outcomes
    ]


def plot(tests: Sequence[Measured], device: str, constants: Constants, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    times = [each.microseconds for each in tests]
    predicted = [
        predict(each.shape, each.active, each.parameters, multiprocessors(device), constants) for each in tests
    ]
    axes.scatter(times, predicted, s=6)
    axes.plot([min(times), max(times)], [min(times), max(times)], color="gray")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"measured on {device}, microseconds")
    axes.set_ylabel("predicted, microseconds")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("fit", type=Path, metavar="JOURNAL", help="that the constants are fitted to")
    parser.add_argument("test", type=Path, metavar="JOURNAL", help="that the predictions are compared with")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    console = Console(width=150)
    fitted_on, fitted = read(args.fit)
    tested_on, tested = read(args.test)
    constants = fit(measured(fitted), multiprocessors(fitted_on))
    console.print(f"Fitted on {fitted_on}: {constants}")
    # Of the other GPU only bandwidth and latency are its own; they are fitted there as well, and shown.
    own = fit(measured(tested), multiprocessors(tested_on))
    console.print(f"On {tested_on} itself: {own}")
    for words, used in (("fitted on the first", constants), ("fitted on itself", own)):
        results = compare(tested, tested_on, used)
        table = Table(title=f"{tested_on}, {words}: the first choice")
        for heading in ("kernel", "N", "K", "rows", "tile", "blocks", "over the best", "over the default"):
            table.add_column(heading, justify="right")
        for each in results:
            tile = f"{each.first.thread_k} x {each.first.thread_n}"
            shape = each.shape
            cells = (shape.kernel, shape.size_n, shape.size_k, each.rows, tile, each.first.blocks)
            table.add_row(*map(str, cells), f"{each.excess:+.1%}", f"{each.against_default:+.1%}")
        console.print(table)
        close = sum(each.excess <= CLOSE for each in results) / len(results)
        worst = max(each.against_default for each in results)
        verdict = "reached" if close >= PART and worst <= SLOWER else "not reached"
        console.print(
            f"Within {CLOSE:.0%} of the best: {close:.0%} of {len(results)}; slowest against the default: "
            f"{worst:+.1%}; {verdict}."
        )
    if args.plot is not None:
        plot(measured(tested), tested_on, constants, args.plot)


if __name__ == "__main__":
    main()
