"""One self-contained HTML page about a run, in progress or over: `streamdpo report RUN`.

    the run's log -> deploy/summary.py (aggregates) -> deploy/figures.py (drawings) -> report.html.jinja (the page)

The page holds no script and loads nothing; every figure on it comes from a record of the log, or is said to be missing.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined

from deploy.config import RunConfig, load_run, run_directory
from deploy.figures import figures
from deploy.roles import open_run_log
from deploy.status import is_live
from deploy.summary import (
    RunSummary,
    add_feedback,
    add_pair,
    add_scored,
    add_time,
    add_weights,
    routed,
)
from streaming import topics
from streaming.errors import RecordError, TrimmedError
from streaming.fencing import read_fences
from streaming.heartbeat import role_states
from streaming.history import entries
from streaming.log.protocol import Entry, Log
from streaming.records import Feedback, Pair, Record, Response, RoleState, ScoredGroup, WeightVersion, decode
from streaming.weights import write_durably

NAME = "report.html"

MAX_TEXT = 4000
"""Characters of a prompt or response shown; the log holds the rest."""

ROLES = ("scheduler", "generator", "scorer", "selector", "learner")
"""In the order in which a prompt meets them."""

R = TypeVar("R", bound=Record)


@dataclass
class Gathered:
    """What was read from a run's log."""

    summary: RunSummary
    states: list[RoleState] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a reader must know before trusting the figures


def write_report(directory: Path) -> Path:
    """Write report.html into a run's directory and return its path.

    It only reads the log, so it may be called while the run goes on. Raises ConfigError where the directory holds no
    run. A page that was there is replaced whole.
    """
    config = load_run(directory)
    with open_run_log(config) as log:
        gathered = gather(log, config.policy)
    path = run_directory(config) / NAME
    write_durably(path, render(config, gathered, now=time.time()).encode())
    return path


def gather(log: Log, policy: str) -> Gathered:
    """Read every topic that the page needs once, from its beginning to where it ends now."""
    gathered = Gathered(RunSummary(policy), states=in_order(role_states(log).values()))
    _read(log, topics.SCORED.name, ScoredGroup, add_scored, gathered)
    _read(log, topics.pairs(policy).name, Pair, add_pair, gathered)
    _read(log, topics.FEEDBACK.name, Feedback, add_feedback, gathered, is_void=read_fences(log).is_void)
    _read(log, topics.WEIGHTS.name, WeightVersion, add_weights, gathered)
    for state in gathered.states:
        add_time(gathered.summary, state.time_s)
    return gathered


def _read(
    log: Log,
    topic: str,
    kind: type[R],
    add: Callable[[RunSummary, R], None],
    gathered: Gathered,
    *,
    is_void: Callable[[R, Entry], bool] = lambda record, entry: False,
) -> None:
    """Add every record of a topic, but those that a learner wrote when a newer start of it had taken over."""
    num_unreadable = 0
    num_trimmed = sum(log.begin_offsets(topic).values())
    try:
        for entry in entries(log, topic):
            add_time(gathered.summary, entry.time_s)
            try:
                record = decode(kind, entry.value, where=entry.where)
            except RecordError:
                num_unreadable += 1
                continue
            if not is_void(record, entry):
                add(gathered.summary, record)
    except TrimmedError:
        gathered.notes.append(f"Topic {topic} was trimmed while this page was made: it was read in part only.")
    if num_trimmed and topic != topics.WEIGHTS.name:  # compacted: older versions are meant to go
        gathered.notes.append(
            f"Retention has taken {counted(num_trimmed, 'record')} from the start of topic {topic}: not on this page."
        )
    if num_unreadable:
        gathered.notes.append(f"Left out of topic {topic}: {counted(num_unreadable, 'unreadable record')}.")


def render(config: RunConfig, gathered: Gathered, *, now: float) -> str:
    """The page's HTML. All text of the run is escaped."""
    environment = Environment(
        loader=PackageLoader("deploy", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        figure=figure, moment=moment, duration=duration, share=share, clipped=clipped, counted=counted
    )
    summary = gathered.summary
    rounds = summary.held_out.complete()
    return environment.get_template("report.html.jinja").render(
        config=config,
        now=now,
        condition=condition(gathered.states, now),
        notes=gathered.notes,
        summary=summary,
        states=gathered.states,
        versions=summary.versions.first + summary.versions.last,
        routes=(routes := routed(summary)),
        num_routed=sum(row.num_groups for row in routes),
        rounds=rounds,
        incomplete=summary.held_out.incomplete(),
        before=rounds[0] if rounds else None,
        after=rounds[-1] if len(rounds) > 1 else None,
        best=summary.held_out.best,
        measured={one.measured.version: one for one in rounds},
        plots=figures(config, summary, gathered.states),
        sides=sides,
        spans=spans,
    )


def in_order(states: Iterable[RoleState]) -> list[RoleState]:
    """Roles as a prompt meets them, those of one kind by their number."""

    def place(state: RoleState) -> tuple[int, int, str]:
        number = state.role_id.rpartition("-")[2]
        name = state.role.partition(".")[0]  # `learner.b` is a learner too
        kind = ROLES.index(name) if name in ROLES else len(ROLES)
        return kind, int(number) if number.isdecimal() else 0, state.role_id

    return sorted(states, key=place)


def condition(states: list[RoleState], now: float) -> str:
    """Whether the run is in progress, over or dead, from its roles' newest beats."""
    if not states:
        return "not started"
    if any(state.health == "failed" for state in states):
        failed = next(state for state in states if state.health == "failed")
        return f"failed: {failed.role_id}" + (f" ({failed.message})" if failed.message else "")
    if all(state.health == "stopped" for state in states):
        return "over"
    if any(is_live(state, now) for state in states):
        return "in progress"
    return f"interrupted, last sign of life {moment(max(state.time_s for state in states))}"


def sides(pair: Pair) -> Mapping[str, Response]:
    """The responses of an example by their role."""
    return {"chosen": pair.chosen} if pair.rejected is None else {"chosen": pair.chosen, "rejected": pair.rejected}


def spans(response: Response) -> str:
    """Which versions sampled a response: one, or each with its tokens."""
    if len(response.spans) == 1:
        return f"version {response.spans[0].version}"
    return "versions " + ", ".join(f"{span.version} (tokens {span.start} to {span.end - 1})" for span in response.spans)


def figure(value: float | None, digits: int = 3) -> str:
    """A number for people; a missing one is a dash."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:,.{digits}f}" if abs(value) < 1e6 else f"{value:.3e}"
    return text.replace("-", "\N{MINUS SIGN}")


def share(value: float, total: float) -> str:
    return f"{value / total:.1%}" if total else "\N{EN DASH}"


def moment(time_s: float) -> str:
    """A Unix time in UTC: the page is read in other places than it was made."""
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"


def duration(seconds: float) -> str:
    """A length of time, in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{value} {unit}" for value, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")) if value]
    return " ".join(parts[:2]) or "0 s"


def counted(number: int, word: str) -> str:
    """A number of things."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def clipped(text: str) -> str:
    """A text of bounded length that says how much is missing."""
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[:MAX_TEXT]} [... {len(text) - MAX_TEXT:,} more characters]"
