"""The main job: starts a run's roles on Ray, watches them, keeps its best version, and knows when it is over.

checked -> started -> watched -> (a limit, the end of the data, Ctrl-C, a role that cannot go on) -> stopped -> kept
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from deploy.config import SAVED, Change, RunConfig, changes, load_run, save_config
from deploy.fleet import Ended, Fleet, connected_ray
from deploy.live import Progress, View, eta
from deploy.promotion import best_of, newest_of, promote, version_directory
from deploy.roles import log_path, open_run_log, run_directory
from deploy.status import Status, read_status
from streaming import topics
from streaming.errors import ConfigError, StreamDPOError
from streaming.evaluation import Measurement, measurements
from streaming.heartbeat import role_states
from streaming.log.protocol import Log
from streaming.records import Feedback, Version, WeightVersion, decode

POLL_S = 0.2
"""Longest wait for a process to end before the clock and the signals are looked at."""

LOOK_S = 0.5
"""Between two looks at the log: the live view's rhythm."""

MAX_SHOWN = 3
"""Newest measurements that are told one by one: a resumed run does not repeat its whole history."""

IDENTITY = ("name", "model", "policy", "scoring.reference", "log.url")
"""Settings that a run's log, checkpoints and reference log-probs are bound to: another value is another run."""


class Outcome(NamedTuple):
    """How a run ended."""

    reason: str
    elapsed_s: float
    measured: list[Measurement]
    """Complete held-out measurements, in the order of their rounds; those of earlier starts too."""

    @property
    def best(self) -> Measurement | None:
        return best_of(self.measured)


class Interrupts:
    """Ctrl-C and SIGTERM: the first asks for a clean stop, the second is in a hurry."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.hurry = threading.Event()

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch both signals inside the block. Outside the main thread there is nothing to catch."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        (self.hurry if self.asked.is_set() else self.asked).set()


def prepare(config: RunConfig) -> list[Change]:
    """Make the run's directory and keep its settings there; what has changed since the last start.

    Raises ConfigError where the directory holds another run.
    """
    directory = run_directory(config)
    saved = directory / SAVED
    changed: list[Change] = []
    if saved.exists():
        changed = [change for change in changes(load_run(directory), config) if change.path != "directory"]
        other = [change for change in changed if change.path in IDENTITY]
        if other:
            text = "; ".join(f"{change.path} was {change.old!r}, now is {change.new!r}" for change in other)
            raise ConfigError(
                f"holds another run: {text}",
                where=str(directory),
                do="Give this run a directory of its own (`directory: ...`), or take the old value back.",
            )
    directory.mkdir(parents=True, exist_ok=True)
    save_config(config, saved)
    return changed


def launch(config: RunConfig, view: View) -> Outcome:
    """Run until it is over. Raises what a role could not go on from; a clean stop by a signal is no error."""
    interrupts = Interrupts()
    for change in prepare(config):
        view.event(f"changed since the last start: {change.path}: {change.old!r} -> {change.new!r}")
    with (
        printing_to(log_path(config, "launcher")),
        connected_ray(config),
        interrupts.caught(),  # after Ray, which has a handler for SIGTERM of its own
        open_run_log(config) as log,
    ):
        started_s, since_s = time.monotonic(), time.time()
        watch = Watch(config, log, view)
        with started_fleet(config, since_s, interrupts, view) as fleet:
            reason = _watch(config, fleet, watch, interrupts, started_s)
            view.event(f"{reason}: stopping (Ctrl-C again: at once)")
        watch.look(time.monotonic() - started_s)
        watch.keep_last()
        return Outcome(reason, time.monotonic() - started_s, watch.measured)


@contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """What libraries print goes to a file, not through the live view (Ray prints every worker's death)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


@contextmanager
def started_fleet(config: RunConfig, since_s: float, interrupts: Interrupts, view: View) -> Iterator[Fleet]:
    """The roles, running; on the way out, whatever the reason, all of them have ended."""
    fleet = Fleet(config, since_s=since_s)
    try:
        yield fleet
    finally:
        for process in fleet.stop(interrupts.hurry):
            view.event(f"{process.role_id} did not stop by itself and was killed")


def _watch(config: RunConfig, fleet: Fleet, watch: "Watch", interrupts: Interrupts, started_s: float) -> str:
    """Why the run is over."""
    looked_s = -LOOK_S
    while not interrupts.asked.is_set():
        for ended in fleet.poll(POLL_S):
            if (reason := watch.ended(ended)) is not None:
                return reason
        elapsed_s = time.monotonic() - started_s
        if elapsed_s - looked_s < LOOK_S:
            continue
        looked_s = elapsed_s
        watch.look(elapsed_s)
        if (reason := _limit(config, watch.newest, elapsed_s)) is not None:
            return reason
    return "stopped by a signal"


def _limit(config: RunConfig, newest: Measurement | None, elapsed_s: float) -> str | None:
    target, minutes = config.stop.heldout_reward, config.stop.max_minutes
    if target is not None and newest is not None and newest.mean >= target:
        return f"held-out reward {newest.mean:.3f} has reached {target:g}"
    if minutes is not None and elapsed_s >= 60 * minutes:
        return f"{minutes:g} minutes have passed"
    return None


class Watch:
    """What the launcher sees in the log: measurements, whose best version it keeps, and every role's state."""

    def __init__(self, config: RunConfig, log: Log, view: View) -> None:
        self._config = config
        self._log = log
        self._view = view
        self._directory = run_directory(config)
        self._feedback = log.assign(log.begin_offsets(topics.FEEDBACK.name))
        self._evaluated: list[Feedback] = []
        self._kept: Measurement | None = None
        self._first_shares: dict[str, float] = {}
        self.measured: list[Measurement] = []
        self.best: Measurement | None = None
        self.newest: Measurement | None = None

    def look(self, elapsed_s: float) -> None:
        """Read on, keep a new best version, show it all."""
        if self._read_feedback():
            before, self.measured = self.measured, [one for one in measurements(self._evaluated) if one.is_complete]
            self.newest, self.best = newest_of(self.measured), best_of(self.measured)
            for one in self.measured[-MAX_SHOWN:]:
                if one not in before:
                    self._view.event(f"held-out reward {one.mean:.3f} (version {one.version}, {one.count} prompts)")
            self._keep_best()
        status = read_status(self._log, self._config)
        remaining = eta(self._shares_done(status, elapsed_s), elapsed_s)
        self._view.update(Progress(self._config.name, status, elapsed_s, remaining, self.best, self.newest))

    def ended(self, ended: Ended) -> str | None:
        """A process ended: why the run is over with it; None where it is not. Raises what cannot be mended."""
        role_id = ended.process.role_id
        if ended.error is None:
            state = role_states(self._log).get(role_id)
            message = state.message if state else ""
            self._view.event(f"{role_id} is done: {message or 'nothing left to do'}")
            return self._reason(message) if ended.process.role == "scheduler" else None
        text = str(ended.error).strip()
        if ended.again_s is None:
            raise self._explained(ended)
        first_line = text.splitlines()[0] if text else type(ended.error).__name__
        self._view.event(f"{role_id} failed: {first_line}; starting it again in {ended.again_s:g} s")
        return None

    def keep_last(self) -> None:
        """The newest published version becomes RUN/last."""
        newest = [
            decode(WeightVersion, entry.value, where=entry.where)
            for entry in self._log.newest(topics.WEIGHTS.name).values()
        ]
        own = [weights for weights in newest if weights.policy == self._config.policy]
        if own:
            self._promote(max(own, key=lambda weights: weights.version).version, "last")

    def _reason(self, message: str) -> str:
        learner = role_states(self._log).get("learner-0")
        if message == "learner stopped" and learner is not None and learner.message == "max_steps":
            return f"the learner has taken its {self._config.learner.max_steps} steps"
        return message or "the scheduler is done"

    def _explained(self, ended: Ended) -> StreamDPOError:
        if isinstance(ended.error, StreamDPOError):
            return ended.error
        return StreamDPOError(
            f"{ended.process.role_id} failed again and again: {type(ended.error).__name__}: {ended.error}",
            where=str(log_path(self._config, ended.process.role_id)),
            do="Read the end of this file. When it is mended, the same command goes on where the run stopped.",
        )

    def _read_feedback(self) -> bool:
        """Whether anything was evaluated since the last look."""
        before = len(self._evaluated)
        while heard := self._feedback.read(max_records=1024, timeout_s=0):
            decoded = (decode(Feedback, entry.value, where=entry.where) for entry in heard)
            self._evaluated += [one for one in decoded if one.ending == "evaluated"]
        return len(self._evaluated) > before

    def _keep_best(self) -> None:
        if self.best is not None and self.best != self._kept and self._promote(self.best.version, "best"):
            self._kept = self.best

    def _promote(self, version: Version, name: str) -> bool:
        source = version_directory(self._directory, self._config.policy, version)
        if promote(source, self._directory / name):
            return True
        self._view.event(f"version {version} is no longer on disk: {name} stays as it is")
        return False

    def _shares_done(self, status: Status, elapsed_s: float) -> dict[str, tuple[float, float]]:
        """How far each limit is, at the first look that knew of it and now."""
        now: dict[str, float] = {}
        step, issued, total = (
            status.number(role, name)
            for role, name in (("learner", "step"), ("scheduler", "issued"), ("scheduler", "total"))
        )
        if self._config.learner.max_steps and step is not None:
            now["steps"] = step / self._config.learner.max_steps
        if issued is not None and total:
            now["data"] = issued / total
        if self._config.stop.max_minutes:
            now["minutes"] = elapsed_s / (60 * self._config.stop.max_minutes)
            self._first_shares.setdefault("minutes", 0.0)
        return {limit: (self._first_shares.setdefault(limit, share), share) for limit, share in now.items()}
