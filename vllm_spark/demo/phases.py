"""What is going on while a server starts, phase by phase."""

from __future__ import annotations

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Phases:
    """Shows what is going on, phase by phase, each with the time that it takes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name = ""
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("  "),
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Phases:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._progress.stop()

    def enter(self, name: str) -> None:
        """Ends the phase before and begins this one; does nothing if it has begun."""
        if name == self._name:
            return
        self._finish()
        self._name = name
        self._task = self._progress.add_task(name, total=1)
        if not self._console.is_terminal:  # a file or a pipe gets a line for each phase
            self._console.print(f"   {name}")

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=1)
