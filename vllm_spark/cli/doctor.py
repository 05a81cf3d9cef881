"""`vllm-spark doctor`: checks this machine and, with `--peer`, the pair."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import TYPE_CHECKING

from rich.console import Console

from vllm_spark.cli import first_run
from vllm_spark.cli.arguments import up_to, user_path, words
from vllm_spark.config.settings import (
    SparkConfig,
    add_flags,
    environment_warnings,
    flag_name,
    given_flags,
    split_endpoint,
)
from vllm_spark.errors import EXIT_PROBLEM, EXIT_USAGE, EXIT_WARNINGS, ConfigurationError, OtherSecretError, SparkError

if TYPE_CHECKING:
    from vllm_spark.doctor.checks import MachineReport
    from vllm_spark.doctor.finding import Finding
    from vllm_spark.doctor.model.question import ModelQuestion

SUMMARY = "check the cable, the RDMA devices, the GPU, the software and a model, and print how to fix problems"

SETTINGS = ("address", "leader", "port", "secret_file")
"""The settings of serve and join that this command has as options."""

_DEFAULT_PLACE = object()
_WAIT_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `vllm-spark doctor`."""
    parser.epilog = (
        f"exit code: 0 no problems, {EXIT_WARNINGS} only warnings, {EXIT_PROBLEM} a problem that keeps the pair from "
        f"working, {EXIT_USAGE} wrong usage or settings"
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=words,
        metavar="MODEL",
        help="also check a model before it is served, as vllm serve is given it (a folder, or a name of the hub that "
        "was downloaded), or a name in configs/models: whether two ranks can divide it and it fits, its files, tuned "
        "tables, and predicted speed. Nothing is downloaded",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--peer",
        action="store_true",
        help="wait for vllm-spark join on the other machine, and show both machines side by side",
    )
    what.add_argument(
        "--first-run",
        action="store_true",
        help="run on both machines, with --listen and --connect, all that the pair needs, and write a report file",
    )
    what.add_argument(
        "--make-secret",
        nargs="?",
        type=user_path,
        const=_DEFAULT_PLACE,
        metavar="PATH",
        help="create the secret that both machines share, without any check; default: vllm-spark/secret in the folder "
        "of your configuration, where serve and join read it",
    )
    parser.add_argument(
        "--wait",
        type=up_to(86400),
        metavar="SECONDS",
        help=f"how long --peer and --first-run wait for the other machine (default: {_WAIT_SECONDS:g})",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object to standard output, and nothing else"
    )
    first_run.add_arguments(parser)
    add_flags(parser, ["leader", "follower", "both"], prefix="--", names=SETTINGS)


def run(args: argparse.Namespace) -> int:
    """Runs the checks and prints their report, or creates a secret.

    Returns:
        0 if all is well, EXIT_WARNINGS if there are warnings only, EXIT_PROBLEM if something keeps the pair from
        working.

    Raises:
        SparkError: a bad setting; or no secret could be made.
    """
    _check_options(args)
    if args.make_secret is not None:
        return _make_secret(args)
    if args.first_run:
        return first_run.run(args, _WAIT_SECONDS if args.wait is None else args.wait)
    from vllm_spark.backend.logging import log_as
    from vllm_spark.doctor.checks import is_bare, run_checks
    from vllm_spark.doctor.report import Report, show, show_bare
    from vllm_spark.doctor.system import System
    from vllm_spark.records import to_json

    log_as("vllm-spark doctor")
    for sentence in environment_warnings():
        Console(stderr=True, highlight=False).print(sentence, markup=False)
    config = SparkConfig.resolve(flags=given_flags(args))
    system = System()
    leader = split_endpoint(config.leader)[0] if config.leader else None
    thorough = args.peer or leader is not None
    question: ModelQuestion | None = None
    of_model: list[Finding] = []
    if args.model is not None:
        from vllm_spark.model_check.checks import examine

        question, of_model = examine(args.model, config)
    machine = run_checks(system, config, leader, thorough=thorough, model=question)
    peer: MachineReport | None = None
    together: list[Finding] = []
    if args.peer:
        from vllm_spark.doctor.network import opening
        from vllm_spark.doctor.pair import compare, distinguish_hosts, other_secret, peer_missing, port_reached
        from vllm_spark.doctor.remote import request_report
        from vllm_spark.executor.channel.addresses import format_endpoint, interface_of, is_loopback, leader_address
        from vllm_spark.executor.channel.secret import same_secret_command

        command = ""
        try:
            address = leader_address(config)
            if not is_loopback(address):
                command = opening(system, config.port, interface_of(address))
            if question is not None:
                from vllm_spark.model_check.checks import with_files

                question = with_files(question, config)
            wait = _WAIT_SECONDS if args.wait is None else args.wait
            peer, there = request_report(config, wait, question, together.append)
        except OtherSecretError as error:
            together += [other_secret(str(error), same_secret_command(config, error.peer))]
        except SparkError as error:
            together += [peer_missing(str(error), command)]
        else:
            machine, peer = distinguish_hosts(machine, peer, address, there)
            reached = port_reached(peer.host, format_endpoint(address, config.port))
            together = [reached, *together, *compare(system, machine, peer)]
    if peer is None:
        others = [finding for finding in machine.findings if finding.area != "model"]
        own = [finding for finding in machine.findings if finding.area == "model"]
        machine = dataclasses.replace(machine, findings=[*others, *of_model, *own])
    else:
        together += of_model
    report = Report.of(machine, peer, together)
    console = Console(highlight=False)
    if args.json:
        print(to_json(report).decode(), flush=True)
    elif is_bare(machine) and not thorough and not given_flags(args) and args.model is None:
        show_bare(console)
    else:
        show(report, console)
    return report.exit_code


def _check_options(args: argparse.Namespace) -> None:
    """Raises ConfigurationError for an option that would have no effect."""
    given = given_flags(args)
    first_run.check_options(args)
    if args.model is not None and (args.first_run or args.make_secret is not None):
        other = "--first-run" if args.first_run else "--make-secret"
        raise ConfigurationError(f"the model {args.model} does not go with {other}; leave one out")
    if args.make_secret is not None:
        useless = [*(["--json"] if args.json else []), *(["--wait"] if args.wait is not None else [])]
        if useless := [*useless, *map(flag_name, given)]:
            raise ConfigurationError(f"{useless[0]} does not go with --make-secret; leave one out")
    elif args.wait is not None and not args.peer and not args.first_run:
        raise ConfigurationError(
            f"--wait {args.wait:g} is the time that --peer and --first-run wait; add one of them, or leave it out"
        )
    if args.peer and "leader" in given:
        raise ConfigurationError(
            f"--leader {given['leader']} is an option of the second machine, and --peer one of the first; leave one out"
        )


def _make_secret(args: argparse.Namespace) -> int:
    from vllm_spark.executor.channel.secret import copy_command, default_secret_file, make_secret

    default = default_secret_file()
    secret = default if args.make_secret is _DEFAULT_PLACE else args.make_secret.absolute()
    if secret is None:
        raise ConfigurationError("this user has no home folder for the secret; give a file: --make-secret PATH")
    make_secret(secret)
    print(f"Created the secret {secret}, readable by this user only. Copy it to the other machine (here called OTHER):")
    print(f"    {copy_command(secret, 'OTHER')}")
    if secret == default:
        print("vllm serve --spark and vllm-spark join read it from there by default.")
    else:
        quoted = shlex.quote(str(secret))
        print(
            f"Then give it to both: vllm serve ... --spark-secret-file {quoted}, vllm-spark join --secret-file {quoted}"
        )
    return 0
