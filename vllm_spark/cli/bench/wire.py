"""`vllm-spark bench wire`: latency and bandwidth of RDMA writes between two machines."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, TaskID, TimeElapsedColumn

from vllm_spark.cli.arguments import add_sides, positive, sizes, user_path, wide_console
from vllm_spark.config.settings import SparkConfig, add_flags, given_flags, log_environment_warnings
from vllm_spark.errors import ConfigurationError
from vllm_spark.files import check_writable

if TYPE_CHECKING:
    from vllm_spark.bench.wire import Plan
    from vllm_spark.collective.link_model import WireModel

SUMMARY = "latency and bandwidth of RDMA writes between two machines, and a wire model of them"

SETTINGS = ("address", "port", "secret_file", "rails", "rail_timeout", "traffic_class", "service_level")
"""The settings of serve and join that this command has as options."""

_LISTENERS = ("sizes", "samples", "bandwidth_sizes", "writes", "depth")
_MOST = 1_000_000
_PLAN_SETTINGS = ("rail_timeout", "traffic_class", "service_level")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options: the side, what to measure, and the files to write."""
    parser.epilog = (
        "Run it on both machines in any order: --listen on one, --connect with its address on the other. "
        "Both print and write the same figures. Neither vllm-spark join nor vllm serve may be running."
    )
    add_sides(parser, "measured", required=True)
    parser.add_argument(
        "--wait", type=positive, default=60, metavar="SECONDS", help="for the other machine (default: 60)"
    )
    listener = parser.add_argument_group("with --listen")
    listener.add_argument(
        "--sizes", type=sizes, metavar="SIZE,...", help="for latency; default: 2, 4, ... 64KiB in powers of two"
    )
    listener.add_argument("--samples", type=positive, metavar="N", help="round trips of each size (default: 10000)")
    listener.add_argument(
        "--bandwidth-sizes", type=sizes, metavar="SIZE,...", help="default: 4KiB, 16KiB, ... 4MiB in powers of four"
    )
    listener.add_argument(
        "--writes", type=positive, metavar="N", help="writes posted back to back for each bandwidth (default: 1000)"
    )
    listener.add_argument("--depth", type=positive, metavar="N", help="outstanding writes on each rail (default: 128)")
    parser.add_argument(
        *("--output", "--out"),
        dest="output",
        type=user_path,
        metavar="FILE",
        help="write the wire model there, for --spark-wire and for --wire of the other benchmarks",
    )
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--plot", type=user_path, metavar="FILE", help="draw both over sizes (png, svg or pdf)")
    add_flags(parser, ["leader", "follower", "both"], prefix="--", names=SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Measures with the other machine, prints tables, and writes the requested files.

    Raises:
        SparkError: a bad setting, no RDMA port, the other machine did not come or does not fit, or the wire failed.
    """
    from vllm_spark.backend.logging import log_as
    from vllm_spark.bench.wire import BenchSession, measure

    log_as("vllm-spark bench wire")
    _check_files(args)
    given = _of_the_plan(args)
    flags = given_flags(args)
    if args.connect:
        flags["leader"] = args.connect
    config = SparkConfig.resolve(flags=flags)
    log_environment_warnings()
    ports = _ports(config)
    rank, plan, join = 1, None, BenchSession.connect
    if args.listen:
        rank, plan, join = 0, _plan(given, config), BenchSession.listen
    with (
        join(config, args.wait) as session,
        Progress(
            *Progress.get_default_columns(), TimeElapsedColumn(), console=Console(stderr=True), transient=True
        ) as progress,
    ):
        task: TaskID = progress.add_task("measuring", total=None)
        plan, model = measure(
            session,
            rank,
            plan,
            ports,
            lambda count: progress.update(task, total=count),
            lambda: progress.advance(task),
        )
    _show(args, plan, model)
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Raises ConfigurationError for files that cannot be written, before anything is measured."""
    from vllm_spark.bench.collective_report import check_plot

    for path in filter(None, (args.output, args.json, args.plot)):
        check_writable(path)
    if args.plot is not None:
        check_plot(args.plot)


def _of_the_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The given options that determine what is measured.

    Raises:
        ConfigurationError: a value is out of range, or this machine does not say what is measured.
    """
    from vllm_spark.bench.wire import MAX_DEPTH

    given: dict[str, Any] = {name: getattr(args, name) for name in _LISTENERS if getattr(args, name) is not None}
    flags = given_flags(args)
    if args.connect and (theirs := [*given, *(name for name in ("address", *_PLAN_SETTINGS) if name in flags)]):
        raise ConfigurationError(
            f"--{theirs[0].replace('_', '-')} is an option of the machine with --listen, which determines what is "
            "measured; leave it out here"
        )
    for name in ("sizes", "bandwidth_sizes"):
        if name in given:
            given[name] = tuple(sorted(set(given[name])))
    for name, most in (("depth", MAX_DEPTH), ("samples", _MOST), ("writes", _MOST)):
        if given.get(name, 1) > most:
            raise ConfigurationError(f"--{name} {given[name]} is too many; give at most {most}")
    return given


def _plan(given: dict[str, Any], config: SparkConfig) -> Plan:
    from vllm_spark.bench.wire import Plan

    return Plan(**given, **{name: getattr(config, name) for name in _PLAN_SETTINGS})


def _show(args: argparse.Namespace, plan: Plan, model: WireModel) -> None:
    """Prints tables, and writes the requested files."""
    from vllm_spark.bench.wire_report import as_json, as_tables, plot
    from vllm_spark.collective.link_model import store_wire_model

    console = wide_console()
    for table in as_tables(plan, model):
        console.print(table)
    if args.output is not None:
        store_wire_model(model, args.output)
        console.print(f"Wrote the wire model {args.output}; use it with --spark-wire or --wire.", soft_wrap=True)
    if args.json is not None:
        args.json.write_text(as_json(plan, model) + "\n")
    if args.plot is not None:
        plot(model, args.plot)


def _ports(config: SparkConfig) -> list[Any]:
    """The RDMA ports of this machine to use.

    Raises:
        ConfigurationError: there are none, or not the chosen ones.
    """
    from vllm_spark.collective import CollectiveError, local_ports
    from vllm_spark.executor.channel.addresses import split_rails

    try:
        ports = local_ports(split_rails(config.rails))
    except CollectiveError as error:
        raise ConfigurationError(str(error)) from None
    if not ports:
        raise ConfigurationError(
            "this machine has no active RDMA port with an address, so there is no wire to measure; vllm-spark doctor "
            "shows what is missing"
        )
    return list(ports)
