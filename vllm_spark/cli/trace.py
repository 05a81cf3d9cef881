"""`vllm-spark trace`: a timeline of decode steps of a pair that serves, from real times of both ranks."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from vllm_spark.backend.pair_status.client import LeaderApi, NoAnswerError, StatusError, checked_url
from vllm_spark.cli.arguments import up_to, user_path, wide_console
from vllm_spark.cli.status import add_server_arguments, no_pair, read_status
from vllm_spark.errors import EXIT_LOST, EXIT_WARNINGS, SparkError
from vllm_spark.recording.records import (
    MOST_SECONDS,
    MOST_SEQUENCES,
    MOST_STEPS,
    PATH,
    PairRecording,
    TraceAnswer,
    TraceRequest,
)

SUMMARY = "record decode steps of the pair that serves: a timeline of both ranks, a picture, the parts of a step"

_COLLECT_SECONDS = 300.0  # for both ranks to write down what they recorded
_DROP_SECONDS = 20.0
_LARGEST = 1 << 30  # bytes of a recording
_LONGEST_PROMPT = 1 << 20


class _NoTraceError(SparkError):
    """The pair recorded nothing."""

    exit_code = EXIT_LOST


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark trace`."""
    add_server_arguments(parser)
    parser.add_argument(
        "--steps",
        type=up_to(MOST_STEPS, int),
        default=50,
        metavar="N",
        help="decode steps to record (default: 50)",
    )
    parser.add_argument(
        "--out",
        type=user_path,
        default=Path("trace.json"),
        metavar="FILE",
        help="the trace, for ui.perfetto.dev or chrome://tracing (default: trace.json)",
    )
    parser.add_argument(
        "--image", type=user_path, metavar="FILE", help="draw the step of median length into this file (png, svg, pdf)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=up_to(_LONGEST_PROMPT, int),
        default=128,
        metavar="N",
        help="tokens of each prompt, which are random (default: 128)",
    )
    parser.add_argument(
        "--batch",
        type=up_to(MOST_SEQUENCES, int),
        default=1,
        metavar="N",
        help="requests at once (default: 1)",
    )
    parser.add_argument(
        "--seconds",
        type=up_to(MOST_SECONDS),
        default=120.0,
        metavar="SECONDS",
        help="after which the recording ends in any case (default: 120)",
    )


def run(args: argparse.Namespace) -> int:
    """Records steps, writes the files and prints the parts.

    Returns:
        0, or EXIT_WARNINGS if the parts of a step do not add up to its time.

    Raises:
        SparkError: no pair answers, it does not permit traces, or it ran no decode steps.
    """
    from vllm_spark.trace.chrome_file import write_trace
    from vllm_spark.trace.load import Load
    from vllm_spark.trace.picture import check_image, draw
    from vllm_spark.trace.report import show
    from vllm_spark.trace.step_parts import lanes_of
    from vllm_spark.trace.timeline import timeline_of

    _check_files(args)
    if args.image is not None:
        check_image(args.image)
    api = LeaderApi(checked_url(args.url), args.api_key)
    model = _model(api)
    load = Load(api, model, args.prompt_tokens, args.batch, args.steps)
    _ask(api, TraceRequest("start", args.steps, args.batch, args.seconds), _DROP_SECONDS)
    collected = False
    try:
        in_time = load.run(args.seconds)
        collected = True
        recording = _collect(api)
    finally:
        if not collected:  # interrupted, or a request failed: the pair need not go on recording
            with contextlib.suppress(SparkError):
                _ask(api, TraceRequest("collect"), _DROP_SECONDS)
    if not any(step.decode for step in recording.ranks[0].steps):
        raise _NoTraceError(
            f"{api.url} ran no decode step in {args.seconds:g} s; give more --seconds, or see whether it answers "
            "requests at all"
        )
    pair = timeline_of(recording)
    lanes = lanes_of(pair)
    about = {
        "model": model,
        "batch": args.batch,
        "prompt_tokens": args.prompt_tokens,
        "steps_compared": len(pair.chosen),
        "token_interval_at_client_us": load.intervals(),
    }
    write_trace(args.out, pair, lanes, about)
    if args.image is not None:
        name = Path(model).name  # of a model that is called by its folder
        draw(pair, args.image, f"{name}, decode, {pair.sequences} sequence{'s' if pair.sequences > 1 else ''}")
    console = wide_console()
    if not in_time or len(pair.chosen) < args.steps:
        console.print(f"{len(pair.chosen)} decode steps were recorded, of {args.steps}.")
    show(console, pair, lanes, load.intervals())
    written = [str(path) for path in (args.out, args.image) if path is not None]
    console.print(f"Written: {', '.join(written)}", soft_wrap=True)
    return 0 if all(lane.agrees for lane in lanes) else EXIT_WARNINGS


def _check_files(args: argparse.Namespace) -> None:
    """Raises ConfigurationError if a file cannot be written: before anything is recorded."""
    from vllm_spark.files import check_writable

    for path in (args.out, args.image):
        if path is not None:
            check_writable(path)


def _model(api: LeaderApi) -> str:
    """The name of the model that the pair serves.

    Raises:
        NoAnswerError: no pair serves there, or none that answers.
    """
    _, report = read_status(api)
    if report.facts is None or report.failure is not None:
        raise no_pair(api.url, report)
    try:
        return str(json.loads(api.ask("/v1/models"))["data"][0]["id"])
    except (StatusError, ValueError, KeyError, IndexError, TypeError) as error:
        raise NoAnswerError(f"{api.url} does not name its model ({error}); see its log") from None


def _ask(api: LeaderApi, request: TraceRequest, seconds: float) -> TraceAnswer:
    from vllm_spark.records import RecordError, from_json, to_json

    try:
        answer = from_json(api.ask(PATH, to_json(request), seconds=seconds, largest=_LARGEST), TraceAnswer)
    except StatusError as error:
        raise NoAnswerError(
            f"{api.url} takes no traces ({error}); use the version of vllm-spark that serves there"
        ) from None
    except RecordError as error:
        raise NoAnswerError(
            f"the answer of {api.url} is not a trace ({error}); use the version of vllm-spark that serves there"
        ) from None
    if answer.refusal:
        raise _NoTraceError(f"{api.url} records nothing: {answer.refusal}")
    return answer


def _collect(api: LeaderApi) -> PairRecording:
    recording = _ask(api, TraceRequest("collect"), _COLLECT_SECONDS).recording
    if recording is None:
        raise _NoTraceError(f"{api.url} has sent no recording; try again")
    return recording
