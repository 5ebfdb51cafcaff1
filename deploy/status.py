"""What a run is doing now: every role's state, and how far each reader is behind. Read from the log only."""

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from deploy.config import RunConfig
from deploy.roles import role_of
from streaming import topics
from streaming.heartbeat import role_states
from streaming.log.protocol import Log
from streaming.metrics import STATES
from streaming.records import RoleState

SILENT_S = 15.0
"""Seconds without a heartbeat after which a role counts as gone: fifteen beats, and longer than any pause seen."""


class Status(NamedTuple):
    """One look at a run."""

    roles: list[RoleState]
    lags: Mapping[str, int]  # by role: entries of its input topic that its group has not settled
    time_s: float

    def number(self, role: str, name: str) -> float | None:
        """A headline figure of the first role of this kind that has it."""
        return next((s.numbers[name] for s in self.roles if s.role == role and name in s.numbers), None)


def read_status(log: Log, config: RunConfig) -> Status:
    """The state of the run as the log has it."""
    return Status(list(role_states(log).values()), _lags(log, config), time.time())


def _lags(log: Log, config: RunConfig) -> dict[str, int]:
    readers = {
        "generator": ("generators", topics.PROMPTS.name),
        "scorer": ("scorer", topics.CANDIDATES.name),
        **{
            role_of("selector", policy): (topics.selectors(policy.name), topics.SCORED.name)
            for policy in config.every_policy
        },
    }
    lags = {}
    for role, (group, topic) in readers.items():
        committed = log.committed(group, [topic])
        lags[role] = sum(max(0, end - committed.get(place, 0)) for place, end in log.end_offsets(topic).items())
    return lags


def is_live(state: RoleState, now_s: float) -> bool:
    """Whether a role is running, as far as its last beat tells."""
    return not _is_over(state) and now_s - state.time_s <= SILENT_S


def health_of(state: RoleState, now_s: float) -> str:
    """The health that a role told, unless it has been silent for too long."""
    return state.health if _is_over(state) or is_live(state, now_s) else f"silent {now_s - state.time_s:.0f} s"


def _is_over(state: RoleState) -> bool:
    return state.health in ("stopped", "failed")


def shares(before: RoleState | None, now: RoleState) -> dict[str, float]:
    """The share of each kind of time between two beats of one start (since its start, without an earlier beat)."""
    start = before.seconds if before is not None and before.epoch == now.epoch else {}
    spent = {state: seconds - start.get(state, 0.0) for state, seconds in now.seconds.items()}
    total = sum(spent.values())
    return {state: seconds / total for state, seconds in spent.items()} if total > 0 else {}


def table(status: Status, before: Mapping[str, RoleState] | None = None) -> Table:
    """A row per role."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("role", "health", *STATES, "lag", "version", "figures"):
        drawn.add_column(name, justify="right" if name in (*STATES, "lag", "version") else "left")
    for state in status.roles:
        drawn.add_row(*_row(state, status, (before or {}).get(state.role_id)))
    return drawn


def _row(state: RoleState, status: Status, before: RoleState | None) -> list[str]:
    spent = shares(before, state)
    health = health_of(state, status.time_s)
    lag = status.lags.get(state.role)
    return [
        state.role_id,
        f"[{_COLOURS.get(health, 'red')}]{health}[/]",
        *(f"{spent[name]:.0%}" if name in spent else "" for name in STATES),
        "" if lag is None else str(lag),
        "" if state.version is None else str(state.version),
        escape("  ".join(part for part in (figures(state), *state.message.splitlines()[:1]) if part)),
    ]


_COLOURS = {"ready": "green", "starting": "yellow", "degraded": "yellow", "stopping": "yellow", "stopped": "blue"}


def figures(state: RoleState) -> str:
    """A role's headline figures on one line: the few that tell how it does, or all of a role that has no such few."""
    shown = [name for name in _HEADLINES.get(state.role.partition(".")[0], ()) if name in state.numbers] or list(
        state.numbers
    )
    return "  ".join(f"{name} {short(state.numbers[name])}" for name in shown)


_HEADLINES = {
    "learner": ("step", "loss", "reward_accuracy", "staleness", "tokens_per_s"),
    "generator": ("in_flight", "samples_per_s", "tokens_per_s"),
    "scorer": ("in_flight", "groups", "reward"),
    "scheduler": ("issued", "outstanding", "heldout_reward"),
}


def short(value: float) -> str:
    """A number as people read it at a glance."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
