"""Progress messages on stderr: a bar on a terminal, and a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Reporter", "Track", "duration", "plain_console"]

Unit = Literal["steps", "bytes", "work"]
"""The unit of progress; "work" is shown as a percentage only."""


def duration(seconds: float) -> str:
    """A duration in words, such as 12 s, 3 min 20 s or 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole // 60 % 60:02} min"


def plain_console(stderr: bool = False) -> Console:
    """A console that writes control characters only to a terminal, also if FORCE_COLOR is set."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(
        force_terminal=terminal, no_color=not terminal or None, width=None if terminal else 110, stderr=stderr
    )


class Track:
    """The progress of one task. `update` may be called at any rate."""

    def __init__(self, reporter: Reporter, label: str, total: int | None, unit: Unit, bar: Progress | None) -> None:
        self._reporter, self._label, self._total, self._unit, self._bar = reporter, label, total, unit, bar
        self._task: TaskID | None = bar.add_task(label, total=total) if bar else None
        self._start = self._said_at = time.monotonic()
        self._said_tenth = 0

    def update(self, done: int, total: int | None = None, label: str | None = None) -> None:
        """Set the progress to `done` of `total`, counted from the start of this task. None keeps a value."""
        self._total, self._label = total or self._total, label or self._label
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=self._total, description=self._label)
        elif self._total:
            # A line is printed at every tenth, but not in quick succession, and once a minute while there is progress.
            now, tenth = time.monotonic(), 10 * done // self._total
            silent = now - self._said_at
            if done and (silent >= 60 or (silent >= 5 and tenth > self._said_tenth)):
                self._said_at, self._said_tenth = now, tenth
                self._reporter.say(self._line(done, self._total, now - self._start))

    def _line(self, done: int, total: int, elapsed: float) -> str:
        percent = f"{100 * done // total}%"
        count = {"bytes": f"{done / 1e6:.0f}/{total / 1e6:.0f} MB ({percent})", "work": percent}
        left = elapsed * (total - done) / done
        text = f"{self._label} {count.get(self._unit, f'{done}/{total} ({percent})')}, {duration(elapsed)}"
        return text + (f", about {duration(left)} left" if done < total and elapsed >= 5 else "")


class Reporter:
    """Prints messages and progress (default: to stderr)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Print one message unchanged."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def track(self, label: str, total: int | None = None, unit: Unit = "steps") -> Iterator[Track]:
        """A progress bar during a ``with`` block; it disappears at the end."""
        if not self.console.is_terminal:
            self.say(f"{label} ...")
            yield Track(self, label, total, unit, None)
            return
        columns = [
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            {"bytes": DownloadColumn, "steps": MofNCompleteColumn, "work": TaskProgressColumn}[unit](),
            TimeElapsedColumn(),
            TextColumn("left"),
            # Compile times of files differ much, so a long window gives a steadier estimate.
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=self.console, transient=True, speed_estimate_period=120) as bar:
            yield Track(self, label, total, unit, bar)

    @contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """A spinner for a task without steps."""
        if self.console.is_terminal:
            with self.console.status(label):
                yield
        else:
            self.say(f"{label} ...")
            yield
