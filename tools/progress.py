"""Progress bars with the time left, one for each stage; plain lines where nobody watches a terminal."""

from __future__ import annotations

import time
from functools import partial
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from onnx_spdy.pipeline.progress import Progress as StageProgress

WITH_PARTS = ("database", "evaluate", "quantise")  # which have counts of their own


class ProgressBars:
    """Shows the progress of stages; a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._console = console
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._started: dict[str, float] = {}
        self._finished: set[tuple[str, str]] = set()

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._bars.disable:  # older versions of rich write an empty line even so
            self._bars.stop()

    def stage(self, name: str) -> StageProgress:
        """What a stage of this name tells its progress to."""
        return partial(self._show, name)

    def _show(self, stage: str, done: int, total: int, note: str) -> None:
        part = note if stage in WITH_PARTS else ""
        key = (stage, part)
        if self._bars.disable:
            self._line(key, done, total, note)
            return
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(stage, total=total, note=note)
        self._bars.update(self._tasks[key], completed=done, total=total, note=note)

    def _line(self, key: tuple[str, str], done: int, total: int, note: str) -> None:
        stage = " ".join(filter(None, key))
        started = self._started.setdefault(stage, time.monotonic())
        if done >= total and key not in self._finished:
            self._finished.add(key)
            seconds = time.monotonic() - started
            text = f"{stage}: {done} done in {seconds:.1f} s" + (f", {note}" if note and note not in key else "")
            self._console.print(text, highlight=False)
