"""All roles of a light run, watched as a launcher does: what dies is started again, whatever the reason.

started -> (dies -> starts again | stands still -> its heir starts -> it wakes)* -> the data are over -> stopped
"""

import heapq
import itertools
import multiprocessing.connection
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, Protocol

from deploy.config import RunConfig
from deploy.roles import settings_of
from streaming.config import LogConfig
from streaming.fencing import AWAY_S
from streaming.log.protocol import Log, Output
from tests.checker import Violation
from tests.learner_process import CONTEXT
from tests.light.fates import Fate, JumpyClock, is_frozen
from tests.light.plan import Plan, Poison, Timed, settings
from tests.light.process import Life, be, open_light_log
from tests.secured import Secured

LOOK_S = 0.05
"""Between two looks whether a process has frozen: nothing tells of that."""

PATIENCE_S = 240.0
"""A run takes some seconds, on a busy machine some ten: one that takes so long does not end."""

STOP_S = 60.0
"""So soon a role has ended that was told to."""

STOPPED = (0, -signal.SIGTERM, -signal.SIGKILL)
"""Exit codes of roles that are told to stop: one that has only just begun has not yet heard of SIGTERM."""

FROZEN_S = AWAY_S + 1.0
"""Longer than a lease, and than what a member thinks that it may be silent without asking."""


class Backend(Protocol):
    """Where the log of a run lies, and as whom a role talks to it."""

    name: str

    def log_of(self, role: str) -> LogConfig:
        """As this role, "operator" or "observer"."""


class Embedded:
    """A log in a file."""

    name = "sqlite"

    def __init__(self, folder: Path) -> None:
        self._config = LogConfig(url=f"sqlite:///{folder}/log.db")

    def log_of(self, role: str) -> LogConfig:
        return self._config


class OnKafka:
    """A run of its own on a cluster, where every role is a user with its rights and no more."""

    name = "kafka"

    def __init__(self, secured: Secured) -> None:
        self._secured = secured

    def log_of(self, role: str) -> LogConfig:
        return self._secured.config(role)


class Injected(NamedTuple):
    """A fault that happened."""

    kind: str
    role_id: str
    time_s: float  # monotonic


@dataclass
class Started:
    """A process, and whether it is its role's newest."""

    life: Life
    process: BaseProcess
    is_frozen: bool = False
    woken_s: float | None = None

    @property
    def name(self) -> str:
        return f"{self.life.role_id}.{self.life.start}"

    @property
    def is_awake(self) -> bool:
        """Whether it has done whatever it was about to do when it froze."""
        return self.life.file("awake").exists() or not self.process.is_alive()


@dataclass
class LightRun:
    """One run; `play` is called once."""

    plan: Plan
    folder: Path
    backend: Backend
    config: RunConfig
    injected: list[Injected] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    zombies: list[Started] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.folder / "lives").mkdir()
        self._clock = JumpyClock(self.folder / "clock")
        self._clock.jump(0.0)
        self._all: list[Started] = []
        self._newest: dict[str, Started] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._starts: Counter[str] = Counter()

    def play(self) -> None:
        """From the first start to the last end. What went wrong with a process is among the violations then."""
        began_s = time.monotonic()
        with self._nobody_left():
            for role_id in self.plan.role_ids:
                self._start(role_id)
            for jump in self.plan.jumps:
                self._at(jump.after_s, lambda by_s=jump.by_s: self._jump(by_s))
            if self.plan.poison:
                with self.open("operator") as log:
                    for poison in self.plan.poison:
                        self._at(poison.after_s, lambda poison=poison: self._append(log, poison))
                    self._watch(began_s)
            else:
                self._watch(began_s)
            self._stop()

    def open(self, role: str) -> Log:
        return open_light_log(self.backend.log_of(role), self.config.name, time.time)

    def _watch(self, began_s: float) -> None:
        while not self._is_over():
            now_s = time.monotonic()
            if now_s > began_s + PATIENCE_S:
                self._broken("liveness", f"the run is not over after {PATIENCE_S:.0f} s; alive", *self._alive())
                return
            while self._events and self._events[0][0] <= now_s:
                heapq.heappop(self._events)[2]()
            sentinels = [one.process.sentinel for one in self._newest.values() if one.process.is_alive()]
            multiprocessing.connection.wait(sentinels, LOOK_S)
            for one in list(self._newest.values()):
                self._look(one)

    def _look(self, one: Started) -> None:
        code = one.process.exitcode
        if code is None and isinstance(one.life.fate, Fate) and one.life.fate.act == "freeze" and not one.is_frozen:
            if is_frozen(one.process.pid or 0):
                self._froze(one)
        elif code == -signal.SIGKILL:
            self._happened("kill", one.life.role_id)
            self._start(one.life.role_id)
        elif code:
            self._broken("died", f"of {_error_of(one.life)}", one.name)

    def _froze(self, one: Started) -> None:
        """The launcher gives it up, and does not know that it will go on."""
        one.is_frozen = True
        self.zombies.append(one)
        self._happened("freeze", one.life.role_id)
        self._start(one.life.role_id)
        self._at(FROZEN_S, lambda: self._wake(one))

    def _wake(self, one: Started) -> None:
        one.woken_s = time.monotonic()
        os.kill(one.process.pid or 0, signal.SIGCONT)

    def _start(self, role_id: str) -> None:
        self._starts[role_id] += 1
        start = self._starts[role_id]
        dooms = self.plan.dooms.get(role_id, ())
        doom = dooms[start - 1] if start <= len(dooms) else None
        life = Life(
            role_id, start, self.folder, settings_of(self.config), self.backend.log_of(role_id.split("-")[0]),
            doom if isinstance(doom, Fate) else None,
        )  # fmt: skip
        process = CONTEXT.Process(target=be, args=(life,), daemon=True)
        process.start()
        self._newest[role_id] = started = Started(life, process)
        self._all.append(started)
        if isinstance(doom, Timed):
            self._at(doom.after_s, process.kill)

    def _at(self, after_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time.monotonic() + after_s, next(self._numbers), act))

    def _jump(self, by_s: float) -> None:
        self._clock.jump(by_s)
        self._happened("clock jump", "")

    def _append(self, log: Log, poison: Poison) -> None:
        log.append([Output(poison.topic, b"poison", poison.value)])
        self._happened("poison", "")

    def _is_over(self) -> bool:
        """The data are at their end, and every zombie has done its last act; or a role died that nobody killed."""
        if self.violations:
            return True
        ends = [self._newest["scheduler-0"], self._newest["learner-0"]]
        return all(one.process.exitcode == 0 for one in ends) and all(one.is_awake for one in self.zombies)

    def _stop(self) -> None:
        for one in self._all:
            if one.process.is_alive():
                one.process.terminate()
        for one in self._all:
            one.process.join(STOP_S)
            if one.process.is_alive():
                self._broken("liveness", "it does not stop", one.name)
            elif one.process.exitcode not in STOPPED and one not in self.zombies:
                self._broken("died", f"of {_error_of(one.life)}", one.name)

    @contextmanager
    def _nobody_left(self) -> Iterator[None]:
        try:
            yield
        finally:
            for one in self._all:
                one.process.kill()
                one.process.join()

    def _happened(self, kind: str, role_id: str) -> None:
        self.injected.append(Injected(kind, role_id, time.monotonic()))

    def _broken(self, invariant: str, what: str, *ids: str) -> None:
        self.violations.append(Violation(invariant, what, ids))

    def _alive(self) -> list[str]:
        return [one.name for one in self._all if one.process.is_alive()]


def _error_of(life: Life) -> str:
    path = life.file("error")
    return path.read_text() if path.exists() else f"something: see {life.file('log')}"


def light_run(plan: Plan, folder: Path, backend: Backend, model: Path, *, run: str = "light") -> LightRun:
    """Its folder has to be there, and for Kafka its topics."""
    return LightRun(plan, folder, backend, settings(plan, folder, model, run))
