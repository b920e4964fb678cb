"""What a person sees while a run goes on: one moving line on a terminal, plain lines in a log."""

import contextlib
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from orchestrator.train.finish import format_usd

LINE_EVERY_S = 10.0


class Progress:
    """Feed it rank 0's status; it draws what is new."""

    def __init__(self, print_line: Callable[[str], None] = lambda line: print(line, flush=True)):
        self.print_line = print_line
        self.bar = self.task = None
        self.said_at, self.said = 0.0, None
        self.first: tuple[float, int] | None = None
        self.warned: set[str] = set()

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=24),
                           TextColumn("{task.fields[facts]}"), TimeRemainingColumn(compact=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("placing", total=None, facts="")
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.stop()

    def say(self, line: str) -> None:
        """A line that stays. A terminal that is closed, a pipe without a reader or a full disk costs no run, nor does a
        reader that has stopped reading, as `less` does: ranks would give up a controller that waits for it."""
        with contextlib.suppress(OSError):
            if not _takes_more(sys.stdout):
                return
            if self.bar is not None:
                self.bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
            else:
                self.print_line(line)

    def warn(self, line: str | None) -> None:
        """A line that is said once, whoever says it; None is none."""
        if line and line not in self.warned:
            self.warned.add(line)
            self.say(line)

    def amount(self, what: str, unit: str, done: int, total: int) -> None:
        """So many millions of something that has been begun."""
        facts = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} {unit}"
        if self.bar is not None:
            self.bar.update(self.task, description=what, completed=done, total=total, facts=facts)
        elif self._due((what, done == total)):
            self.say(f"{what} {facts}")

    def show(self, status: dict) -> None:
        """status: of rank 0, see `Control.status`."""
        for notice in status.get("notices", ()):
            self.warn(notice)
        step, steps = status.get("step", 0), status.get("steps", 0)
        if status.get("phase") == "start":
            facts, description, step, steps = "", "starting", None, None
        else:
            parts = [f"step {step}/{steps}"]
            if status.get("loss") is not None:
                parts += [f"loss {status['loss']:.4f}", f"{status['tokens_per_s']:,.0f} tokens/s",
                          f"{format_usd(status['usd_total'])} so far"]
            facts, description = ", ".join(parts), "training" if status.get("phase") != "save" else "saving"
        if self.bar is not None:
            self.bar.update(self.task, description=description, completed=step or 0, total=steps, facts=facts)
        elif step and self._due(("step", step == steps), fresh=step):
            self.say(f"{facts}{self._eta(status)}")

    def follow(self, status: Callable[[], dict], stopped: threading.Event, *, every_s: float = 0.5) -> None:
        """Show what `status()` says until stopped; for a thread beside the rank program."""
        while not stopped.wait(every_s):
            self.show(status())

    def _eta(self, status: dict) -> str:
        if self.first is None:
            self.first = time.time(), status["step"]
        since, left, done = self.first[0], status["steps"] - status["step"], status["step"] - self.first[1]
        return f", {_duration((time.time() - since) / done * left)} left" if left and done > 0 else ""

    def _due(self, kind: object, fresh: object = None) -> bool:
        """Whether it is time for another line: every few seconds, and at once when the kind of news changes."""
        now = time.monotonic()
        if (kind, fresh) == self.said or (self.said and kind == self.said[0] and now - self.said_at < LINE_EVERY_S):
            return False
        self.said_at, self.said = now, (kind, fresh)
        return True


def _takes_more(stream: TextIO) -> bool:
    try:
        return bool(select.select([], [stream], [], 0)[1])
    except ValueError:  # no file
        return True


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}:{rest:02d}"
