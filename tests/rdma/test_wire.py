"""`vllm-spark bench wire` between both machines: the real command over real queue pairs. What it times is soft-RoCE."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vllm_spark.collective.link_model import WireModel, fit, load_wire_model
from vllm_spark.config.settings import SparkConfig
from vllm_spark.executor.bootstrap import modelled_wire
from vllm_spark.processes.managed import program

from .machines import Command, Finished, Machine, Pair

BOUND = 400.0
WAIT = ["--wait", "240"]
"""Both begin together; under emulation a start takes 10 s to a minute."""
SECRET = "the secret of both machines"
SIZES, BANDWIDTH_SIZES = (2, 64, 4096, 65536), (4096, 65536)
QUICK = [
    *("--sizes", "64KiB,2,64,4KiB", "--samples", "60"),
    *("--bandwidth-sizes", "4KiB,64KiB", "--writes", "60", "--depth", "8"),
    *("--rail-timeout", "4"),  # a busy host stops an emulated machine for longer than the default
]


def start(machine: Machine, *arguments: str | Path, secret: str = SECRET) -> Command:
    words = ["python", "-m", "vllm_spark", "bench", "wire", *map(str, arguments)]
    return machine.start(words, env={"VLLMSPARK_SECRET": secret})


def both(machines: Pair, listen: Sequence[str | Path], connect: Sequence[str | Path]) -> tuple[Command, Command]:
    one, other = machines
    address = one.rails[0].address
    return (
        start(one, "--listen", "--address", address, *WAIT, *listen),
        start(other, "--connect", address, *WAIT, *connect),
    )


def sentence(finished: Finished) -> str:
    """The last line, which must be all that was said of the failure."""
    assert "Traceback" not in finished.output
    last = finished.stderr.strip().splitlines()[-1]
    assert last.startswith("vllm-spark: ")
    return last


def test_both_rails_are_measured_and_the_loopback_transport_takes_the_file(machines: Pair) -> None:
    shared = machines[0].shared
    files = [shared / "wire.json", shared / "same.json"]
    figures = shared / "figures.json"
    commands = both(machines, [*QUICK, "--output", files[0], "--json", figures], ["--output", files[1]])
    for command in commands:
        finished = command.wait(BOUND)
        assert finished.exit_code == 0, finished.output
        for part in ("One way, microseconds", "p99.9", "64 KiB", "rail 0", "rail 1", "all rails", "rxe1:1 to rxe1:1"):
            assert part in finished.stdout
        assert "over rail 0 (rxe0) and rail 1 (rxe1)." in finished.stderr
    model = load_wire_model(files[0])
    assert load_wire_model(files[1]) == model, "both machines have the same figures"
    assert [rail.devices for rail in model.rails] == [("rxe0:1", "rxe0:1"), ("rxe1:1", "rxe1:1")]
    assert [rail.mtu for rail in model.rails] == [4096, 4096]
    assert [text.partition(":")[0] for text in model.machines] == ["machine0", "machine1"]
    assert "between machine0 and machine1" in model.provenance
    for wire in (*model.rails, model.total):
        assert tuple(point.bytes for point in wire.latency) == SIZES
        assert tuple(point.bytes for point in wire.bandwidth) == BANDWIDTH_SIZES
        assert wire.fit == fit(wire.latency, wire.bandwidth)
    # Not about speed: each was measured by itself.
    assert len({wire.latency for wire in (*model.rails, model.total)}) == 3
    content = json.loads(figures.read_text())
    assert content["settings"]["samples"] == 60
    assert WireModel.model_validate(content["wire"]) == model
    check_loopback(files[0], model)


def check_loopback(file: Path, model: WireModel) -> None:
    """Ranks on this side exchange messages over the wire of that file."""
    config = SparkConfig.resolve(flags={"wire": file, "loopback_mode": "proxied"}, environment={})
    expected = model.figures()
    assert modelled_wire(config) == expected
    report = file.with_name("collective.json")
    words = ["bench", "collective", "--device", "cpu", "--sizes", "1KiB", "--samples", "1"]
    done = subprocess.run(
        [program("vllm-spark"), *words, "--wire", file, "--json", report],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(report.read_text())
    assert content["settings"]["wire"] == expected.model_dump(mode="json")
    (minimum,) = [row["minimum"] for row in content["rows"] if row["candidate"] == "wire"]
    assert minimum > min(rail.latency[0][1] for rail in expected.rails), "no message is faster than the wire"


@pytest.mark.thorough
def test_one_rail_and_one_size(machines: Pair) -> None:
    file = machines[0].shared / "one.json"
    one_size = ["--sizes", "8", "--samples", "20", "--bandwidth-sizes", "1MiB", "--writes", "4", "--depth", "512"]
    for command in both(machines, [*one_size, "--rails", "rxe1", "--output", file], []):
        finished = command.wait(BOUND)
        assert finished.exit_code == 0, finished.output
        assert "all rails" not in finished.stdout
    model = load_wire_model(file)
    assert [rail.devices for rail in model.rails] == [("rxe1:1", "rxe1:1")]
    assert model.total.latency == model.rails[0].latency


@pytest.mark.thorough
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_side_that_is_killed(machines: Pair, stopped: int) -> None:
    commands = both(machines, ["--samples", "1000000"], [])
    for command in commands:
        command.wait_for_line("Measuring with", timeout=BOUND)
    commands[stopped].kill()
    finished = commands[1 - stopped].wait(BOUND)
    assert finished.exit_code == 4
    assert "the other machine" in sentence(finished)


@pytest.mark.thorough
def test_a_rail_that_fails_is_named_on_both_sides(machines: Pair) -> None:
    """The other rail, which carries the channel, works on."""
    commands = both(machines, ["--samples", "1000000", "--sizes", "4096", "--rails", "rxe1"], [])
    for command in commands:
        command.wait_for_line("Measuring with", timeout=BOUND)
    for machine in machines:
        machine.rails[1].unplug()
    said = []
    for command in commands:
        finished = command.wait(BOUND)
        assert finished.exit_code == 4
        said.append(sentence(finished))
    # Whoever notices first tells the other one.
    assert any("rail 0 (rxe1) to machine" in text and "status 12" in text for text in said), said
    for text in said:
        assert "rail 0 (rxe1) to machine" in text


@pytest.mark.thorough
def test_nobody_on_the_other_side(machines: Pair) -> None:
    one, other = machines
    address = one.rails[0].address
    listening = start(one, "--listen", "--address", address, "--wait", "3")
    finished = start(other, "--connect", f"{address}:29999", "--wait", "3").wait(BOUND)
    assert finished.exit_code == 4
    assert f"nothing listened at {address}:29999 within 3 s" in sentence(finished)
    assert "vllm-spark bench wire --listen" in sentence(finished)
    finished = listening.wait(BOUND)
    assert finished.exit_code == 4
    assert f"no follower connected to {address}:29650 within 3 s" in sentence(finished)
    assert f"vllm-spark bench wire --connect {address}:29650" in sentence(finished)


@pytest.mark.thorough
def test_another_secret_and_no_such_rail(machines: Pair) -> None:
    one, other = machines
    address = one.rails[0].address
    listening = start(one, "--listen", "--address", address, *WAIT)
    listening.wait_for_line("Waiting for the follower", timeout=BOUND)
    finished = start(other, "--connect", address, *WAIT, secret="another secret of this machine").wait(BOUND)
    assert finished.exit_code == 2
    assert "the other side has another secret" in sentence(finished)
    finished = start(other, "--connect", address, "--rails", "rxe7").wait(BOUND)
    assert finished.exit_code == 2
    assert "there is no RDMA port rxe7:1; this machine has rxe0:1, rxe1:1" in sentence(finished)
    listening.wait_for_line("Rejected a connection from 10.0.0.2: .* another secret", timeout=BOUND)
    assert listening.exit_code is None, "it waits for one that fits"
