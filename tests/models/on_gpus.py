"""Serves every row of `gpu_rows` on two GPUs by stock vLLM and by a pair, several rows at a time.

    python -m tests.models.on_gpus FOLDER [--only NAME,...] [--seconds 540]
    python -m tests.models.report FOLDER/rows.jsonl

Both servers of a row get the same four prompts, one after the other, twice: tokens and the logarithms of their
probabilities must be equal to the last bit. Stock vLLM's ranks exchange data with NCCL through host memory: a sum of
two has one rounding, whoever adds. The rows `sampled_*` draw tokens with speculation until `SAMPLED_STEPS` steps were
done: both ranks must have drawn the same ones.

Every row has its own time limit and failures. FOLDER gets `results.jsonl`, a line for each row as soon as it is over,
with the last lines of the logs of what failed; `rows.jsonl` for the table; and `logs.tar.gz` at the end. With
`--device cpu` the rows that vLLM's CPU build serves test this program.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from openai import OpenAIError

from benchmarks.servers import Place, Started, start_server
from tests.serve.counters import settled
from tests.serve.servers import Server
from vllm_spark.errors import SparkError
from vllm_spark.processes.group import ERROR

from . import report
from .answers import Answers
from .gpu_rows import MAX_MODEL_LENGTH, ROWS, GpuRow
from .sampled import SAMPLED_STEPS, Drawn, draw_tokens

TWO_GPUS = "two GPUs"
ROW_SECONDS = 300.0
RESERVED_SECONDS = 25.0
"""Of all the time: for ending what runs, and for the archive of logs."""
FIRST_SHARE = 0.8
"""Of a row's time, for stock vLLM to start: the pair, which starts beside it, can still be asked in the rest."""
TAIL_LINES = 25
MESSAGE_LENGTH = 240
LOG_PREFIX = re.compile(r"^\(.*?\) (?:ERROR .*?\] )?")
"""Of a line in vLLM's logs: process, time and place."""
SMALL_ON_A_GPU = (
    *("--gpu-memory-utilization", "0.06"),
    *("--kv-cache-memory-bytes", str(1 << 30)),  # or each rank measures what the others leave it
)
FEW_THREADS = {"OMP_NUM_THREADS": "2"}
STOCK, PAIR = "stock", "spark"

EQUAL, OTHER, FAILED, NOT_RUN = "equal", "other", "failed", "not run"


@dataclass
class Result:
    """What became of a row.

    Attributes:
        outcome: `EQUAL`; `OTHER`: answers differ, or collectives fell back; `FAILED`: a server did; `NOT_RUN`.
        result: for the table, in the words of `report`; empty if it belongs to none.
        seconds: from the beginning of the row to its end.
        start_seconds: of each server, until it was healthy.
        errors: of each server that failed: the error, then the last lines of each of its processes' output.
        repeats: whether each server gave the same answers the second time.
    """

    row: str
    outcome: str = NOT_RUN
    result: str = ""
    seconds: float = 0.0
    start_seconds: dict[str, float] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    repeats: dict[str, bool] = field(default_factory=dict)


def main() -> int:
    """Runs the rows; returns how many are neither equal nor a limit of stock vLLM, at most 99."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", help="names of rows, separated by commas")
    parser.add_argument("--at-once", type=int, default=7, help="rows that are served together")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which nothing runs any more")
    parser.add_argument("--row-seconds", type=float, default=ROW_SECONDS)
    parser.add_argument("--steps", type=int, default=SAMPLED_STEPS, help="of the rows that draw tokens")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--only: there is no row {', '.join(unknown)}; the rows are {', '.join(ROWS)}")
    deadline = time.monotonic() + args.seconds - RESERVED_SECONDS
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ[report.MODELS.variable] = str(args.folder / "rows.jsonl")
    with (
        tempfile.TemporaryDirectory(prefix="vllm-spark-rows-") as temporary,
        (args.folder / "results.jsonl").open("a") as out,
    ):
        folder = Path(temporary)
        place = Place(args.device, folder / "logs", folder / "caches")
        place.logs.mkdir()
        models = Models(folder)
        results = []
        with ThreadPoolExecutor(args.at_once) as pool:
            futures = [
                pool.submit(run_row, name, place, models, deadline, args.row_seconds, args.steps) for name in names
            ]
            for future in as_completed(futures):
                result = future.result()
                results.append(result)
                out.write(json.dumps(asdict(result)) + "\n")
                out.flush()
                show(result)
                if result.result:
                    record(result, args.device)
        shutil.make_archive(str(args.folder / "logs"), "gztar", place.logs)
    return summarize(results)


class Models:
    """Makes checkpoints, one at a time: transformers and torch's random generator are shared by all threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()

    def make(self, name: str, row: GpuRow, device: str) -> tuple[Path, list[str]]:
        """The row's model, and the arguments of `vllm serve` for it."""
        with self._lock:
            model = row.make_model(self._folder / name / "model")
            return model, row.serve_arguments(device, model)


def run_row(
    name: str, place: Place, models: Models, deadline: float, row_seconds: float, steps: int = SAMPLED_STEPS
) -> Result:
    """Runs one row; whatever happens is in its result."""
    began = time.monotonic()
    result, row = Result(name), ROWS[name]
    if began + 1 > deadline:
        return result
    try:
        model, arguments = models.make(name, row, place.device)
    except Exception as error:  # an architecture that this transformers does not have, say
        result.outcome = FAILED
        result.errors["model"] = _traceback(error)
        return result
    arguments += ["--max-model-len", str(MAX_MODEL_LENGTH), *(SMALL_ON_A_GPU if place.device == "cuda" else ())]
    limit = min(deadline, time.monotonic() + row_seconds)
    try:
        if row.drafted:
            _run_sampled(result, row, place, model, arguments, limit, steps)
        else:
            _run_compared(result, row, place, model, arguments, limit)
    except Exception as error:
        result.outcome, result.result = FAILED, ""
        result.errors["row"] = _traceback(error)
    shutil.rmtree(model.parent, ignore_errors=True)
    result.seconds = round(time.monotonic() - began, 1)
    return result


def _run_compared(
    result: Result, row: GpuRow, place: Place, model: Path, arguments: Sequence[str], limit: float
) -> None:
    answers: dict[str, Answers] = {}
    counted = ""
    with ExitStack() as stack:
        servers = {
            kind: stack.enter_context(_running(kind, result.row, model, arguments, place, limit))
            for kind in (STOCK, PAIR)
        }
        for kind, started in servers.items():
            share = FIRST_SHARE if kind == STOCK else 1.0
            with _noting_errors(result, kind, started):
                started.wait_until_healthy(max(0.0, share * (limit - time.monotonic())))
                result.start_seconds[kind] = round(started.ready_seconds, 1)
                server = as_server(started)
                lengths = row.served.prompt_lengths
                answers[kind] = row.served.ask(server, lengths)
                result.repeats[kind] = row.served.ask(server, lengths) == answers[kind]
                if kind == PAIR:
                    counted = _collectives(server)
    if STOCK not in result.start_seconds and "has not become healthy" in message(result, STOCK):
        result.outcome = FAILED  # too slow here, which says nothing of it
    elif time.monotonic() > limit and len(answers) < len(servers):
        result.outcome = FAILED  # it was ended here: that says nothing of it
    elif STOCK not in answers:
        result.outcome, result.result = FAILED, f"{report.STOCK_LIMIT}: `{message(result, STOCK)}`"
    elif PAIR not in answers:
        result.outcome, result.result = FAILED, f"{report.LIMIT}: `{message(result, PAIR)}`"
    elif answers[STOCK] != answers[PAIR] or not counted.endswith(" 0 fallbacks"):
        result.outcome = OTHER
        result.errors["answers"] = [counted, *_differences(answers[STOCK], answers[PAIR])]
    else:
        result.outcome = EQUAL
        result.result = f"{report.EQUAL}: {answers[PAIR].counted}; {counted}"


def _run_sampled(
    result: Result, row: GpuRow, place: Place, model: Path, arguments: Sequence[str], limit: float, steps: int
) -> None:
    drawn: Drawn | None = None
    counted = ""
    with (
        _running(PAIR, result.row, model, arguments, place, limit) as started,
        _noting_errors(result, PAIR, started),
    ):
        started.wait_until_healthy(max(0.0, limit - time.monotonic()))
        result.start_seconds[PAIR] = round(started.ready_seconds, 1)
        server = as_server(started)
        drawn = draw_tokens(server, steps, limit - RESERVED_SECONDS)
        counted = _collectives(server)
    if drawn is None:
        result.outcome = FAILED
    elif not drawn.same_tokens or drawn.steps < steps or not counted.endswith(" 0 fallbacks"):
        result.outcome = OTHER
        result.errors["answers"] = [f"{drawn}, {counted}"]
    else:
        result.outcome = EQUAL
        result.result = f"{report.EQUAL}: {drawn.sentence}; {counted}"


@contextmanager
def _running(
    kind: str, name: str, model: Path, arguments: Sequence[str], place: Place, limit: float
) -> Iterator[Started]:
    """A server that is killed at `limit`, so that whatever waits for it fails then."""
    with ExitStack() as stack:
        server = start_server(kind, f"{name}-{kind}", model, arguments, place, environment=FEW_THREADS)
        stack.callback(server.stop, 5.0)
        timer = threading.Timer(max(0.0, limit - time.monotonic()), server.kill)
        timer.daemon = True
        stack.callback(timer.cancel)
        timer.start()
        yield server


@contextmanager
def _noting_errors(result: Result, kind: str, started: Started) -> Iterator[None]:
    try:
        yield
    except (SparkError, OpenAIError, OSError) as error:
        lines = [f"{type(error).__name__}: {error}"]
        for process in started.processes:
            lines += [f"== {process.name}", *own_errors(process.output()), "..."]
            lines += process.tail(TAIL_LINES).splitlines()
        result.errors[kind] = [line[:400] for line in lines]
        started.kill()


def _traceback(error: Exception) -> list[str]:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return [f"{type(error).__name__}: {error}", *lines[-TAIL_LINES:]]


def as_server(started: Started) -> Server:
    """The same with a client, and with leader and follower by name."""
    *first, leader = started.processes
    return Server(started.url, leader, first[0] if first else None)


def own_errors(output: str) -> list[str]:
    """The first few different exceptions in a log: the cause comes first. One of pydantic has its reason beside it."""
    text = _without_colours(output)
    found = (
        f"{each[1]}{_validation_fault(text[each.end() :])}" if "validation error" in each[1] else each[1]
        for each in ERROR.finditer(text)
    )
    return list(dict.fromkeys(found))[:6]


def _validation_fault(following: str) -> str:
    """The first fault in the lines after the heading of a ValidationError: the field, if there is one, and the message.

    A field has a line to itself, and the message is indented below it.
    """
    lines = [LOG_PREFIX.sub("", line) for line in following.splitlines()[1:3]]
    for count, line in enumerate(lines):
        if line.startswith("  "):
            return "".join(f": {part.strip()}" for part in [*lines[:count], line.partition(" [type=")[0]])
    return ""


def _without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def message(result: Result, kind: str) -> str:
    """The first exception of a server that failed, in one line, without names of temporary files."""
    lines = result.errors.get(kind, [""])
    found = next((line for line in lines[1:] if ERROR.match(line)), lines[0])
    found = re.sub(r"\S*vllm-spark-rows-\S*", "MODEL", found).replace("`", "'")
    return found[:MESSAGE_LENGTH]


def _differences(stock: Answers, pair: Answers) -> list[str]:
    return [
        f"answer {place}: {json.dumps(one)[:300]} | {json.dumps(other)[:300]}"
        for place, (one, other) in enumerate(zip(stock.values, pair.values, strict=False))
        if one != other
    ]


def _collectives(server: Server) -> str:
    metrics = settled(server)
    reduces, gathers = (int(metrics[f"vllm_spark_{kind}_total"]["0"]) for kind in ("all_reduces", "all_gathers"))
    fallbacks = sum(int(value) for value in metrics["vllm_spark_fallbacks_total"].values())
    return f"{reduces} all-reduces, {gathers} all-gathers, {fallbacks} fallbacks"


def record(result: Result, device: str) -> None:
    """Adds the row to the file of rows."""
    row = ROWS[result.row]
    speculation = report.NO_SPECULATION
    if row.drafted:
        method = result.row.partition("_")[2]
        speculation = f"{method}, {row.drafted} tokens, drawn at temperatures up to 1"
    where = TWO_GPUS if device == "cuda" else report.CPU
    label = row.label if not row.drafted else "bfloat16, compiled" if device == "cuda" else "bfloat16"
    report.record(row.architecture, row.served.model_class, label, result.result, speculation=speculation, where=where)


def show(result: Result) -> None:
    """Two lines at most for each row, as soon as it is over."""
    starts = ", ".join(f"{kind} {seconds:g} s" for kind, seconds in result.start_seconds.items())
    print(f"{result.row}: {result.outcome} in {result.seconds:.0f} s ({starts}) {result.result}", flush=True)
    for kind, lines in result.errors.items():
        print(f"    {kind}: {' | '.join(lines[:3])[:600]}", flush=True)
    if not all(result.repeats.values()):
        print(f"    repeats itself: {result.repeats}", flush=True)


def summarize(results: Sequence[Result]) -> int:
    """Prints the number of rows by outcome; returns how many are neither equal nor a limit of stock vLLM."""
    bad = [
        result.row for result in results if result.outcome != EQUAL and not result.result.startswith(report.STOCK_LIMIT)
    ]
    counts = Counter(result.outcome for result in results)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    print(f"to look at: {', '.join(bad) or '-'}")
    return min(len(bad), 99)


if __name__ == "__main__":
    sys.exit(main())
