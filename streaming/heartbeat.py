"""A role's sign of life: one small record a second, which `status`, the learner and the launcher read.

started -> beating (every `interval_s`, or at once after `tell`) -> stopped (a last beat says so)
"""

import os
import socket
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from streaming import topics
from streaming.errors import LogError, SupersededError
from streaming.fencing import epoch_key
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.readable import readable
from streaming.records import RoleState, encode

INTERVAL_S = 1.0
"""One beat a second: `status` looks live, and a day of beats is a few megabytes before compaction."""


Beats = Mapping[str, tuple[int, float]]
"""Role id -> (which start of it, when by its own clock): the newest beat at some moment."""


NO_HISTORY: Beats = MappingProxyType({})
"""Nothing had beaten before."""


class Heartbeat:
    """Writes this role's state to the log until it is closed. Its `state` may be read at any time."""

    def __init__(
        self, log: Log, metrics: Metrics, *, role: str, index: int = 0, interval_s: float = INTERVAL_S
    ) -> None:
        self._log = log
        self._metrics = metrics
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._beating = threading.Lock()  # beats come in the order of their times; `tell` waits for none
        self._wake = threading.Event()
        role_id = f"{role}-{index}"
        self.state = RoleState(
            role=role, role_id=role_id, pid=os.getpid(), host=socket.gethostname(), time_s=time.time(),
            epoch=last_epoch(log, role_id) + 1, health="starting",
        )  # fmt: skip
        self._beat()
        self._thread = threading.Thread(target=self._run, name=f"heartbeat-{role_id}", daemon=True)
        self._thread.start()

    def tell(self, *, at_once: bool = False, **changes: Any) -> None:
        """Change fields of the state (health, version, leases, numbers, ...); `at_once` writes it before returning."""
        with self._lock:
            self.state = msgspec.structs.replace(self.state, **changes)
        if at_once:
            self._beat()

    def close(self, *, health: str = "stopped", message: str = "") -> None:
        """Write a last beat. Nothing more is written afterwards."""
        self._wake.set()
        self._thread.join()
        self.tell(at_once=True, health=health, message=message, leases=[])

    def _run(self) -> None:
        while not self._wake.wait(self._interval_s):
            try:
                self._beat()
            except LogError:  # the role itself is well: its next beat says so
                self._metrics.count("beats_failed_total")

    def _beat(self) -> None:
        with self._beating:
            with self._lock:
                seconds = self._metrics.time.seconds()
                self.state = state = msgspec.structs.replace(self.state, time_s=time.time(), seconds=seconds)
            self._log.append([Output(topics.ROLES.name, epoch_key(state.role_id, state.epoch), encode(state))])


def role_states(log: Log) -> dict[str, RoleState]:
    """The newest state of every role that ever beat in this run, by role id.

    A start that a newer one has followed says nothing any more, however late it speaks.
    """
    states = readable(RoleState, log.newest(topics.ROLES.name).values())
    in_order = sorted(states, key=lambda state: (state.role_id, state.epoch, state.time_s))
    return {state.role_id: state for state in in_order}


def beats(log: Log) -> dict[str, tuple[int, float]]:
    """Every role's newest beat, as it is now."""
    return {role_id: (state.epoch, state.time_s) for role_id, state in role_states(log).items()}


def states_since(log: Log, history: Beats) -> dict[str, RoleState]:
    """The newest state of every role that has beaten since. By no clock: that may go back meanwhile."""
    states = role_states(log).items()
    return {role_id: state for role_id, state in states if (state.epoch, state.time_s) != history.get(role_id)}


def refuse_to_be_second(own: RoleState, states: Mapping[str, RoleState]) -> None:
    """Raises SupersededError where a newer start of one's own role has beaten."""
    newest = states.get(own.role_id, own)
    if newest.epoch > own.epoch:
        raise SupersededError(
            f"start {newest.epoch} of this role is running, this is start {own.epoch}",
            where=f"{own.role_id} (the newer one: pid {newest.pid} on {newest.host})",
            do="Nothing: the newer one goes on from the log.",
        )


def last_epoch(log: Log, role_id: str) -> int:
    """How often this role has started before; 0 for the first time."""
    state = role_states(log).get(role_id)
    return state.epoch if state else 0
