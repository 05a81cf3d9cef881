"""`vllm-spark estimate`: predicts a decode step of a model on one machine and on two."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vllm_spark.cli.arguments import (
    add_wire_arguments,
    modelled_wire,
    positives,
    up_to,
    user_path,
    wide_console,
)
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import check_writable

if TYPE_CHECKING:
    from vllm_spark.estimate.collectives import Collectives
    from vllm_spark.estimate.model import Model
    from vllm_spark.estimate.pair import Settings

SUMMARY = "predicted tokens per second and memory of a model on one machine and on two, without running it"

_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_MOST_SEQUENCES, _MOST_TOKENS, _MOST_DRAFTED = 1 << 16, 1 << 30, 64
_ACCEPTANCE = 0.6
_DRAFT = "mtp"
_LARGEST_SKEW = 3.0
_MARKDOWN_WIDTH = 240
_KV_BYTES = {"bfloat16": 2.0, "fp8": 1.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: model, workload, machines, link, and the files to write."""
    parser.epilog = (
        "Neither a GPU nor weights are needed, only the model's config.json. The result is a prediction from published "
        "figures of a GB10; docs/estimate.md compares it with measured speeds."
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder or file with a config.json, a model of the hub, or a name in configs/models",
    )
    parser.add_argument(
        "--published", action="store_true", help="compare the prediction with measured speeds instead; no MODEL"
    )
    parser.add_argument(
        "--batch", type=up_to(_MOST_SEQUENCES, int), default=1, metavar="N", help="sequences at once (default: 1)"
    )
    parser.add_argument(
        "--context",
        type=up_to(_MOST_TOKENS, int),
        default=1024,
        metavar="TOKENS",
        help="of each sequence (default: 1024)",
    )
    parser.add_argument(
        "--kv-cache-dtype", choices=list(_KV_BYTES), default="bfloat16", help="of the KV cache (default: bfloat16)"
    )
    parser.add_argument(
        "--routing-skew",
        type=_skew,
        metavar="S",
        help="of experts: the i-th most popular one is chosen in proportion to i ** -S (default: 0.68, as measured for "
        "one model; random weights: 0; sequences about one subject: 1 and more)",
    )
    _add_speculation(parser.add_argument_group("speculation"))
    _add_machines(parser.add_argument_group("machines"))
    add_wire_arguments(parser)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures there as well")
    parser.add_argument(
        "--plot", type=user_path, metavar="FILE", help="draw tokens per second over batches (png, svg or pdf)"
    )
    parser.add_argument(
        "--batches",
        type=positives,
        metavar="N,...",
        help=f"of the plot (default: {','.join(map(str, _BATCHES))})",
    )


def _add_speculation(group: Any) -> None:
    group.add_argument(
        "--speculate",
        type=up_to(_MOST_DRAFTED, int),
        metavar="N",
        help="tokens that are drafted in a step (default: none)",
    )
    group.add_argument(
        "--acceptance",
        type=up_to(1),
        metavar="P",
        help="probability that a drafted token is accepted if all before it were; vLLM's metrics have it "
        f"(default: {_ACCEPTANCE:g})",
    )
    group.add_argument(
        "--draft",
        metavar="DRAFT",
        help="mtp: the model's own layer; ngram: no model; or, as MODEL, an EAGLE or EAGLE3 head or a smaller model "
        f"(default: {_DRAFT})",
    )


def _add_machines(group: Any) -> None:
    group.add_argument(
        "--gpu", default="gb10", metavar="GPU", help="gb10; or h100 or h200, two of one host (default: gb10)"
    )
    group.add_argument(
        "--memory-gbytes-per-s",
        type=up_to(1e5),
        metavar="GB/S",
        help="the memory's measured bandwidth; that of other kernels changes in proportion (default: a published one)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=up_to(1),
        default=0.8,
        metavar="SHARE",
        help="of the memory, as for vllm serve (default: 0.8)",
    )
    group.add_argument(
        "--expert-parallel", action="store_true", help="each of two machines has half of the experts, whole"
    )
    group.add_argument(
        "--collective-us",
        type=up_to(1e6),
        metavar="MICROSECONDS",
        help="what a step waits for each collective; in place of both columns of two machines",
    )
    group.add_argument(
        "--collectives",
        type=user_path,
        metavar="FILE",
        help="the same, with the figures that vllm-spark bench collective --json FILE wrote",
    )


def run(args: argparse.Namespace) -> int:
    """Prints one table and a sentence, and writes the requested files.

    Raises:
        SparkError: bad arguments, or a model that cannot be estimated.
    """
    if args.published:
        if args.model is not None:
            raise ConfigurationError(f"--published compares known set-ups, and takes no model; leave {args.model} out")
        _show_published()
        return 0
    if args.model is None:
        raise ConfigurationError("MODEL is missing; give a config.json, a model of the hub or a name in configs/models")
    _check_options(args)
    from vllm_spark.estimate.pair import estimate, over_batches
    from vllm_spark.estimate.report import as_json, as_table, plot
    from vllm_spark.models.config import read_model_config

    for path in filter(None, (args.json, args.plot)):
        check_writable(path)
    if args.plot is not None:
        from vllm_spark.bench.collective_report import check_plot

        check_plot(args.plot)
    settings = _settings(args)
    name, config = read_model_config(args.model)
    draft_of = _draft(args.draft or _DRAFT, config)
    found = estimate(name, config, settings, draft_of)
    console = wide_console()
    console.print(as_table(found))
    console.print(found.verdict, soft_wrap=not console.is_terminal)
    if args.json is not None:
        args.json.write_text(as_json([found]) + "\n")
    if args.plot is not None:
        batches = sorted(set(args.batches or _BATCHES))
        plot(over_batches(name, config, settings, draft_of, batches), args.plot)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises ConfigurationError for an option without the one that it is for, or for two that contradict each other."""
    if args.speculate is None:
        for name, value in (("acceptance", args.acceptance), ("draft", args.draft)):
            if value is not None:
                raise ConfigurationError(f"--{name} {value} is for speculation; add --speculate, or leave it out")
    if args.batches is not None and args.plot is None:
        given = ",".join(map(str, args.batches))
        raise ConfigurationError(f"--batches {given} is for the plot; add --plot, or leave it out")
    if args.collective_us is not None and args.collectives is not None:
        raise ConfigurationError("--collectives and --collective-us contradict each other; leave one out")


def _skew(text: str) -> float:
    """An exponent from 0 to 3."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _LARGEST_SKEW:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {_LARGEST_SKEW:g}")
    return value


def _settings(args: argparse.Namespace) -> Settings:
    """The settings of the options.

    Raises:
        ConfigurationError: an unknown GPU, or a link whose options contradict each other.
    """
    from vllm_spark.collective.link_model import PUBLISHED_FIGURES
    from vllm_spark.estimate.collective_file import load_collectives
    from vllm_spark.estimate.collectives import DIRECT, NCCL, NCCL_H200, fixed, over_the_cable
    from vllm_spark.estimate.experts import SKEW
    from vllm_spark.estimate.gpu import GB10, GPUS, with_bandwidth
    from vllm_spark.estimate.pair import Settings
    from vllm_spark.estimate.step import Workload

    gpu = GPUS.get(args.gpu.lower())
    if gpu is None:
        raise ConfigurationError(f"there are no figures of the GPU {args.gpu!r}; known are {', '.join(GPUS)}")
    if args.memory_gbytes_per_s is not None:
        gpu = with_bandwidth(gpu, args.memory_gbytes_per_s)
    link = modelled_wire(args)
    collectives: tuple[Collectives, ...] = (over_the_cable(link), NCCL)
    if gpu.name != GB10.name and link is PUBLISHED_FIGURES:  # two of one host
        collectives = (DIRECT, NCCL_H200)
    if args.collective_us is not None:
        collectives = (fixed(args.collective_us),)
    if args.collectives is not None:
        collectives = load_collectives(args.collectives)
    return Settings(
        gpu=gpu,
        work=Workload(
            args.batch,
            args.context,
            kv_bytes=_KV_BYTES[args.kv_cache_dtype],
            skew=SKEW if args.routing_skew is None else args.routing_skew,
        ),
        collectives=collectives,
        drafted=args.speculate or 0,
        acceptance=(args.acceptance or _ACCEPTANCE) if args.speculate else 0.0,
        expert_parallel=args.expert_parallel,
        utilization=args.gpu_memory_utilization,
    )


def _draft(draft: str, config: Mapping[str, Any]) -> Callable[[int], Model | None]:
    """The draft that the option names, by the number of machines."""
    from vllm_spark.estimate.model import read_model
    from vllm_spark.estimate.speculation import eagle_head, own_draft_layer
    from vllm_spark.models.config import read_model_config
    from vllm_spark.models.config_values import names

    if draft == "ngram":
        return lambda tp: None
    if draft == "mtp":
        return lambda tp: own_draft_layer(config, tp)

    @functools.cache
    def from_config(tp: int) -> Model:
        of_draft = read_model_config(draft)[1]
        is_head = "draft_vocab_size" in of_draft or any(
            "eagle" in name.lower() for name in names(of_draft, "architectures")
        )
        return (eagle_head if is_head else read_model)(of_draft, tp)

    return from_config


def _show_published() -> None:
    from vllm_spark.estimate.agreement import (
        by_others,
        explanations,
        mean_error,
        own,
        parts_table,
        several_sequences,
        sources,
        speeds_table,
    )

    # In a file a row must be one line of Markdown.
    console = wide_console() if sys.stdout.isatty() else Console(width=_MARKDOWN_WIDTH)
    others, several, ours = by_others(), several_sequences(), own()
    console.print(speeds_table(others, "One sequence, measured by others on GB10"))
    flow = not console.is_terminal
    console.print(f"Mean error {mean_error(others):.1%}, without the bad set-up. {sources(others)}.\n", soft_wrap=flow)
    console.print(speeds_table(several, "Several sequences at once, measured by others on GB10"))
    console.print(f"Mean error {mean_error(several):.1%}. {sources(several)}.\n", soft_wrap=flow)
    console.print(parts_table(), "")
    console.print(speeds_table(ours, "Measured by this project: Qwen3-30B-A3B INT4, a step"))
    console.print(f"Mean error {mean_error(ours):.1%}. {sources(ours)}.\n", soft_wrap=flow)
    for line in explanations([*others, *several, *ours]):
        console.print(f"- {line}", soft_wrap=flow)
