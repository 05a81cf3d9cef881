"""What a trace costs: the interval between tokens at the client, without and while steps are recorded; in one run.

    python -m benchmarks.trace_overhead --out trace.json --image trace.png --json FILE

A pair is served over the modelled link. Each round asks it, and asks it by `vllm-spark trace`, for the same tokens. The
figures are the medians of each round; the ratio is the median of the rounds' ratios. The last round's trace and picture
are kept. Needs two GPUs; `--device cpu` has both ranks on this machine's cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_spark.backend.pair_status.client import LeaderApi
from vllm_spark.cli import main as vllm_spark
from vllm_spark.cli.arguments import positive
from vllm_spark.errors import SparkError
from vllm_spark.processes.group import process_group
from vllm_spark.trace.load import Load

from .served_model import MODELS, make_model
from .served_streams import ON_A_CPU, ON_A_GPU
from .servers import START_SECONDS, Place, Started, start_server

ROOM = 64  # tokens of the context, for the steps before and after those that are recorded
LOAD_SECONDS = 600.0
PLAIN, RECORDED = "nothing recorded", "recorded"


def plain(server: Started, args: argparse.Namespace) -> float:
    """Microseconds between tokens, the median of one request, as `vllm-spark trace` would send it."""
    api = LeaderApi(server.url)
    model = json.loads(api.ask("/v1/models"))["data"][0]["id"]
    load = Load(api, model, args.prompt_tokens, args.batch, args.steps)
    if not load.run(LOAD_SECONDS):
        raise SparkError(f"{server.name} did not answer within {LOAD_SECONDS:g} s")
    return statistics.median(load.intervals())


def recorded(server: Started, args: argparse.Namespace, out: Path, image: Path | None) -> float:
    """The same, while the steps are recorded."""
    words = [
        *("trace", "--url", server.url, "--steps", str(args.steps), "--batch", str(args.batch)),
        *("--prompt-tokens", str(args.prompt_tokens), "--out", str(out)),
        *(("--image", str(image)) if image is not None else ()),
    ]
    if code := vllm_spark(words):
        raise SparkError(f"vllm-spark {' '.join(words)} ended with exit code {code}")
    intervals: list[float] = json.loads(out.read_text())["otherData"]["token_interval_at_client_us"]
    return statistics.median(intervals)


def measure(server: Started, args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Figures of each kind, one a round; the first round is not counted."""
    figures: dict[str, list[float]] = {PLAIN: [], RECORDED: []}
    for turn in range(args.rounds + 1):
        last = turn == args.rounds
        out = args.out if last and args.out is not None else folder / "trace.json"
        found = {PLAIN: plain(server, args), RECORDED: recorded(server, args, out, args.image if last else None)}
        if turn > 0:
            for kind, figure in found.items():
                figures[kind].append(figure)
    return figures


def show(figures: dict[str, list[float]], console: Console) -> None:
    """A table."""
    table = Table("steps", "us between tokens, median", "least", "most", "ratio")
    for kind, values in figures.items():
        ratio = statistics.median(mine / other for mine, other in zip(values, figures[PLAIN], strict=True))
        shown = [f"{value:,.0f}" for value in (statistics.median(values), min(values), max(values))]
        table.add_row(kind, *shown, f"{ratio:.3f}")
    console.print(table)


def main() -> int:
    """Starts the pair, measures and shows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=sorted(MODELS), default="cuda")
    parser.add_argument("--batch", type=positive, default=1)
    parser.add_argument("--prompt-tokens", type=positive, default=128)
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--start-seconds", type=float, default=START_SECONDS, help="for the pair to become healthy")
    parser.add_argument("--out", type=Path, help="keep the last trace there")
    parser.add_argument("--image", type=Path, help="and its picture there")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--keep-logs", type=Path)
    args = parser.parse_args()
    console = Console(width=140)
    context = args.prompt_tokens + args.steps + args.batch * 4 + ROOM
    arguments = [
        *("--load-format", "dummy", "--seed", "0", "--max-model-len", str(context)),
        *("--max-num-seqs", str(args.batch), *(ON_A_GPU if args.device == "cuda" else ON_A_CPU)),
    ]
    with process_group("trace-overhead", console, args.keep_logs) as group, ExitStack() as stack:
        model = make_model(group.folder / "model", MODELS[args.device])
        place = Place(args.device, group.logs, group.folder / "caches")
        more = ["--spark-trace", "on", "--served-model-name", MODELS[args.device]]
        server = start_server("spark-wire", "spark", model, [*arguments, *more], place)
        stack.callback(server.stop)
        server.wait_until_healthy(args.start_seconds)
        figures = measure(server, args, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    if args.json is not None:
        args.json.write_text(json.dumps(figures))
    show(figures, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
