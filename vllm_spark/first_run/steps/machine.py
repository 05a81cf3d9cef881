"""The step `machine`: the doctor's checks of this machine in short, and the rails between both machines."""

from __future__ import annotations

from vllm_spark.collective import CollectiveError, local_ports
from vllm_spark.collective.rails import pair
from vllm_spark.collective.rendezvous import Ports, swap_ports
from vllm_spark.doctor.checks import run_checks
from vllm_spark.doctor.finding import Finding
from vllm_spark.executor.channel.addresses import split_rails
from vllm_spark.first_run.context import Context
from vllm_spark.first_run.result import Advice, Outcome, StepFailedError

CHECKED = ("machine.memlock", "machine.handover", "rdma.", "link.")
"""Beginnings of the ids of the doctor's findings that decide whether the pair can work."""

_NO_RAIL = Advice(
    "the machines are joined by no cable that both use for RDMA",
    "give both ends of each cable addresses in one network, and see vllm-spark doctor on both machines",
)


def run(context: Context) -> Outcome:
    """Fails where no rail is there, or a finding of the doctor is a problem; warnings of the doctor are one here."""
    context.note("checking this machine")
    try:
        mine = Ports(tuple(local_ports(split_rails(context.config.rails))))
    except CollectiveError as error:
        mine = Ports(problem=str(error))
    try:
        theirs = swap_ports(context.peer.exchange, mine)
        context.ports = list(mine.ports)
        context.rails = pair(context.ports, theirs, context.rank)
    except CollectiveError as error:
        raise StepFailedError(f"there is no rail between the machines ({error})", _NO_RAIL) from None
    machine = run_checks(context.system, context.config, thorough=True)
    context.machine = machine
    findings = [finding for finding in machine.findings if finding.id.startswith(CHECKED)]
    # Devices without an entry in sysfs are seen by libibverbs alone: the doctor finds none then.
    if not machine.rails:
        findings = [finding for finding in findings if not finding.id.startswith(("rdma.", "link."))]
    for finding in findings:
        if finding.status == "problem":
            raise StepFailedError(_seen(finding), _advice(finding))
    names = ", ".join(context.rail_name(index) for index in range(len(context.rails)))
    figures = {"rails": [{"device": rail.device, "port": rail.port, "mtu": rail.mtu} for rail in context.rails]}
    troubled = [finding for finding in findings if finding.status == "warning"]
    if troubled:
        return Outcome(names, figures, "; ".join(_seen(finding) for finding in troubled), _advice(troubled[0]))
    return Outcome(names, figures)


def _seen(finding: Finding) -> str:
    return finding.title + (f": {finding.value}" if finding.value else "")


def _advice(finding: Finding) -> Advice:
    remedy = "; ".join(line.strip() for line in finding.remedy.splitlines()) or "see vllm-spark doctor"
    return Advice(finding.explanation.rstrip("."), remedy.rstrip("."))
