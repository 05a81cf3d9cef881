"""A tuning run on this machine's GPU: search, comparison of decode steps, tables, and what the user sees of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from vllm_spark.errors import ConfigurationError
from vllm_spark.kernels.devices import Device
from vllm_spark.kernels.runtime import this_device
from vllm_spark.processes.group import ProcessGroup, process_group
from vllm_spark.tune.decode_comparison import Comparison, Settings, compare, promoted
from vllm_spark.tune.journal import Journal, Kept, installed_versions
from vllm_spark.tune.plan import Plan, TuningOptions, backend, backend_hints, check_version_takes_int4
from vllm_spark.tune.report import comparison_table, outcomes_tables, plot
from vllm_spark.tune.results import Outcome, Shape, tunable_rows
from vllm_spark.tune.tables import NewTable, new_tables, store_tables
from vllm_spark.tune.timing import lock_gpu
from vllm_spark.tune.tuned_model import TunedModel
from vllm_spark.tune.tuner import tune


@dataclass(frozen=True)
class Machine:
    """The GPU that is measured, and the software that it is measured with.

    Attributes:
        device: the GPU model's limits.
        gpu_uuid: of this one GPU.
        gpu_name: as the driver gives it.
        versions: of vLLM, torch, Triton, this project and the driver.
    """

    device: Device
    gpu_uuid: str
    gpu_name: str
    versions: Mapping[str, str]

    @property
    def caption(self) -> str:
        """GPU and versions, for tables and plots."""
        return ", ".join([self.gpu_name, *(f"{name} {version}" for name, version in self.versions.items())])


def this_machine() -> Machine:
    """The machine of this process.

    Raises:
        ConfigurationError: torch or vLLM is not installed, or CUDA sees no GPU.
    """
    try:
        import torch
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(f"tuning needs vLLM and torch here ({error}); install vLLM") from None
    if not torch.cuda.is_available():
        raise ConfigurationError("tuning needs a GPU that CUDA sees, and this machine has none; run it where you serve")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    return Machine(this_device(), uuid, torch.cuda.get_device_name(), installed_versions())


class TuningSession:
    """One run of `vllm-spark tune MODEL`.

    Args:
        options: as the user gave them.
        plan: models and shapes (`plan.prepare`).
        folder: of the tables; created if needed.
        machine: that is measured.
        console: for progress, results and notes.

    Raises:
        ConfigurationError: the folder cannot be written, or the installed vLLM does not run these kernels.
    """

    def __init__(self, options: TuningOptions, plan: Plan, folder: Path, machine: Machine, console: Console):
        if options.kernels == "triton":
            check_version_takes_int4(plan.labels)
        self._options, self._plan, self._folder = options, plan, folder
        self._machine, self._console = machine, console
        self._journal = Journal(folder, machine.device.name, machine.versions)

    def run(self) -> None:
        """Searches, compares whole decode steps, writes the tables and prints the results.

        Raises:
            HangError: a kernel hangs. The process must not wait for the GPU from here on.
            SparkError: another tuner is running, a kernel or an engine failed, or a file cannot be written.
        """
        with self._journal.exclusive(), lock_gpu(self._machine.gpu_uuid):
            outcomes = self.search()
            for table in outcomes_tables(outcomes, self._machine.caption):
                self._console.print(table)
            if not self._options.decode:
                self._print("No decode step was compared (--no-decode): the tables rest on the kernels' times alone.")
            self.write_tables(outcomes)
        for sentence in backend_hints(self._plan.labels):
            self._print(sentence)
        if self._options.plot is not None:
            plot(outcomes, self._machine.caption, self._options.plot)

    def search(self) -> list[Outcome]:
        """The fastest parameters of every shape and number of tokens, those in the journal included.

        Raises:
            HangError: a kernel hangs.
            SparkError: the GPU has no room, or a kernel failed.
        """
        shapes, rows = list(self._plan.labels), self._options.rows
        outcomes: list[Outcome] = []
        notes: dict[str, None] = {}
        compiled = 0
        total = sum(len(tunable_rows(shape, rows)) for shape in shapes)
        progress = _progress()

        def state() -> str:
            return f"{len(outcomes)} of {total} results are in {self._folder}; the same command continues from there"

        def on_outcome(outcome: Outcome) -> None:
            outcomes.append(outcome)
            progress.advance(task)

        def on_trial() -> None:
            nonlocal compiled
            compiled += 1
            progress.update(task, description=f"searching, {compiled} kernels compiled")

        with self._state_when_stopped(state), progress:
            task = progress.add_task("searching", total=total)
            tune(shapes, rows, self._machine.device, self._journal, on_outcome, on_trial, notes.setdefault)
        for sentence in notes:
            self._note(sentence)
        return outcomes

    def write_tables(self, outcomes: Sequence[Outcome]) -> None:
        """Compares the decode steps of each size, and writes the tables of that size before it starts the next.

        The results of one size are on disk when a later one fails.

        Args:
            outcomes: of the search.

        Raises:
            SparkError: an engine failed, or a file cannot be written.
        """
        sizes = self._plan.sizes
        done = 0

        def state() -> str:
            return (
                f"tables for {done} of {len(sizes)} sizes are written, and the results of the search are in "
                f"{self._folder}; the same command compares decode steps again"
            )

        latest: dict[tuple[Shape, int], Outcome] = {(outcome.shape, outcome.rows): outcome for outcome in outcomes}
        with self._state_when_stopped(state):
            for model, shapes in sizes:
                of_size = [outcome for outcome in latest.values() if outcome.shape in shapes]
                if of_size and self._options.decode:
                    of_size = promoted(of_size, self.decode_ratios(model, shapes, self._tables(of_size)))
                    latest |= {(outcome.shape, outcome.rows): outcome for outcome in of_size}
                self._journal.add_kept([Kept(outcome, tuple(self._plan.labels[outcome.shape])) for outcome in of_size])
                for path in store_tables(self._tables(of_size), self._folder, self._note):
                    self._print(f"Written: {path}")
                done += 1

    def decode_ratios(
        self, model: TunedModel, shapes: Sequence[Shape], candidates: Sequence[NewTable]
    ) -> dict[int, float]:
        """Times of decode steps with `candidates` over those without, by batch; prints them as a table.

        Raises:
            SparkError: an engine failed.
        """
        comparisons = self._compare(model, shapes, candidates)
        self._console.print(comparison_table(model.label, comparisons, self._machine.caption))
        return {each.batch: each.ratio for each in comparisons}

    def _compare(self, model: TunedModel, shapes: Sequence[Shape], candidates: Sequence[NewTable]) -> list[Comparison]:
        """Runs the engines, which see `candidates` and no other table of this user."""
        options = self._options
        logs = None if options.keep_logs is None else options.keep_logs / f"tp{model.tp}"
        progress = _progress()
        started = 0

        def on_engine(side: str, number: int) -> None:
            nonlocal started
            progress.update(task, completed=started, description=f"decoding TP={model.tp}, round {number + 1}: {side}")
            started += 1

        with process_group("tune", self._console, logs) as programs, progress:
            task = progress.add_task("decoding", total=2 * options.rounds)
            return compare(
                self._comparison_settings(model, shapes, candidates, programs), programs, on_engine, self._note
            )

    def _comparison_settings(
        self, model: TunedModel, shapes: Sequence[Shape], candidates: Sequence[NewTable], programs: ProcessGroup
    ) -> Settings:
        options = self._options
        folder = programs.folder / "config" / "vllm-spark" / "tuned"
        store_tables(candidates, folder)
        engine = {**backend(shapes), **options.engine}
        return Settings(
            self._plan.config, model.tp, folder, rounds=options.rounds, engine=engine, timeout=options.timeout
        )

    def _tables(self, outcomes: Sequence[Outcome]) -> list[NewTable]:
        """Tables of these outcomes, merged with the journal's and with the tables in the folder."""
        machine = self._machine
        kept = self._journal.kept().values()
        return new_tables(outcomes, self._plan.labels, machine.device, dict(machine.versions), kept, self._folder)

    def _print(self, sentence: str) -> None:
        self._console.print(escape(sentence), soft_wrap=True)

    def _note(self, sentence: str) -> None:
        self._console.print(f"[yellow]NOTE[/]: {escape(sentence)}", soft_wrap=True)

    @contextmanager
    def _state_when_stopped(self, state: Callable[[], str]) -> Iterator[None]:
        """Prints `state()` when Ctrl-C or another signal stops what is inside."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self._print(f"Stopped: {state()}.")
            raise


def _progress() -> Progress:
    return Progress(*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn(), transient=True)
