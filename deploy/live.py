"""What a person sees while a run goes on: one live table on a terminal, plain lines anywhere else.

Knows how to show, not what to do: the launcher hands it a Progress and events.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.status import Status, short, table
from streaming.evaluation import Measurement
from streaming.records import RoleState

PLAIN_S = 10.0
"""Between two plain lines: a day of them is a readable file."""

SHARES_S = 5.0
"""Busy and idle shares are those of the last seconds: long enough that one weight update does not flicker."""

MAX_EVENTS = 6
"""Newest events under the live table."""


class Progress(NamedTuple):
    """One look at a run, with what only the launcher knows."""

    name: str
    status: Status
    elapsed_s: float
    eta_s: float | None
    best: Measurement | None
    newest: Measurement | None


class View(Protocol):
    """Shows a run."""

    def update(self, progress: Progress) -> None:
        """Called about twice a second."""

    def event(self, text: str) -> None:
        """Something happened that a person should know."""


def headline(progress: Progress) -> str:
    """The run on one line."""
    status = progress.status
    parts = [clock(progress.elapsed_s)]
    for label, role, name in _FIGURES:
        if (value := status.number(role, name)) is not None:
            parts.append(f"{label} {short(value)}")
    if progress.newest is not None:
        parts.append(f"held-out {progress.newest.mean:.3f} (version {progress.newest.version})")
    if progress.best is not None:
        parts.append(f"best {progress.best.mean:.3f} ({progress.best.version})")
    if progress.eta_s is not None:
        parts.append(f"eta {clock(progress.eta_s)}")
    return "  ".join(parts)


_FIGURES = (
    ("step", "learner", "step"),
    ("reward", "scorer", "reward"),
    ("margin", "selector", "margin"),
    ("staleness", "learner", "staleness"),
    ("tokens/s", "generator", "tokens_per_s"),
    ("ahead", "scheduler", "outstanding"),
)
"""Label, role, name of its figure."""


def clock(seconds: float) -> str:
    """1:02:03, or 02:03 below an hour."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def eta(fractions: Mapping[str, tuple[float, float]], elapsed_s: float) -> float | None:
    """Seconds until the first limit passes; None where no limit says.

    A limit is (share done when the run started, share done now): a resumed run does not begin at 0.
    """
    times = [elapsed_s * (1 - now) / (now - first) for first, now in fractions.values() if now > first]
    return min((max(0.0, seconds) for seconds in times), default=None)


class PlainView:
    """A line every ten seconds and at every event, for files and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown_s = time.monotonic()

    def update(self, progress: Progress) -> None:
        if time.monotonic() - self._shown_s >= PLAIN_S:
            self._shown_s = time.monotonic()
            self._print(f"{progress.name}  {headline(progress)}")

    def event(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class LiveView:
    """One table that is drawn again in place, with the newest events under it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._events: list[str] = []
        self._progress: Progress | None = None
        self._earlier: list[Status] = []

    def update(self, progress: Progress) -> None:
        self._progress = progress
        self._earlier.append(progress.status)
        while len(self._earlier) > 1 and self._earlier[1].time_s <= progress.status.time_s - SHARES_S:
            del self._earlier[0]
        self._draw()

    def event(self, text: str) -> None:
        self._events = [*self._events, text][-MAX_EVENTS:]
        self._draw()

    def _draw(self) -> None:
        parts: list[Text | Table] = []
        if self._progress is not None:
            before: dict[str, RoleState] = {state.role_id: state for state in self._earlier[0].roles}
            parts = [Text(f"{self._progress.name}  {headline(self._progress)}", style="bold")]
            parts.append(table(self._progress.status, before))
        parts += [Text(event, style="dim") for event in self._events]
        self._live.update(Group(*parts))


@contextmanager
def opened_view() -> Iterator[View]:
    """The live table where standard output is a terminal, plain lines elsewhere.

    It keeps the stream that it finds: what is redirected inside the block does not disturb it.
    """
    stream = sys.stdout
    console = Console(file=stream)
    if not console.is_terminal:
        yield PlainView(stream)
        return
    with Live(console=console, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False) as live:
        yield LiveView(live)
