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

from deploy.config import SAVED, Change, RunConfig, changes, load_run, run_directory, save_config
from deploy.fleet import Ended, Fleet, connected_ray
from deploy.live import View
from deploy.lock import only_launcher
from deploy.roles import log_path, open_run_log, processes
from deploy.watch import Watch
from streaming.errors import ConfigError, StreamDPOError
from streaming.evaluation import Measurement, best_of
from streaming.heartbeat import Beats, beats

POLL_S = 0.2
"""Longest wait for a process to end before the clock and the signals are looked at."""

LOOK_S = 0.5
"""Between two looks at the log: the live view's rhythm."""

IDENTITY = (
    *("name", "model", "policy", "scoring.reference", "log.url", "learner.zero_stage", "learner.dtype"),
    *("prompts.eval_path", "prompts.eval_split", "prompts.max_eval_prompts"),
)
"""Settings that a run's log, checkpoints, reference log-probs and best version are bound to: another value is another
run. Held-out rewards compare only on the same prompts."""


BY_SIGNAL = "stopped by a signal"
"""Reason of a run that a person or the system ended: the same command goes on."""


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
        has_begun = (directory / "weights").exists()  # before that there is nothing to be bound to
        other = [change for change in changed if has_begun and is_bound(change.path, config)]
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


def is_bound(path: str, config: RunConfig) -> bool:
    """Whether a setting cannot change within a run. With ZeRO every rank's checkpoint holds its own part.

    A further policy may come, and go; while it is there it is bound to the same.
    """
    learners = {policy.name: policy.learner for policy in config.every_policy}
    section, _, rest = path.partition(".")
    name, _, within = rest.partition(".") if section == "policies" else (config.policy, "", path)
    is_sharded = name in learners and learners[name].effective_zero_stage > 0
    return within in IDENTITY or within == "reference" or (within == "learner.world_size" and is_sharded)


def launch(config: RunConfig, view: View) -> Outcome:
    """Run until it is over. Raises what a role could not go on from; a clean stop by a signal is no error.

    Raises NotReadyError where this run is running already.
    """
    interrupts = Interrupts()
    with only_launcher(run_directory(config)), interrupts.caught():
        return _launch(config, view, interrupts)


def _launch(config: RunConfig, view: View, interrupts: Interrupts) -> Outcome:
    for change in prepare(config):
        view.event(f"changed since the last start: {change.path}: {change.old!r} -> {change.new!r}")
    view.event(f"{config.name}: starting {len(processes(config))} processes; their log files: {log_path(config, '*')}")
    with (
        printing_to(log_path(config, "launcher")),
        connected_ray(config),
        open_run_log(config) as log,
    ):
        started_s = time.monotonic()
        watch = Watch(config, log, view)
        with started_fleet(config, beats(log), interrupts, view) as fleet:
            reason = _watch(config, fleet, watch, interrupts, started_s)
            view.event(f"{reason}: stopping (Ctrl-C again: at once)")
        watch.look(time.monotonic() - started_s)
        watch.keep_last()
        if watch.broken:
            raise watch.broken[0]
        return Outcome(reason, time.monotonic() - started_s, watch.measured)


@contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """What libraries print goes to a file, not through the live view (Ray prints every worker's death)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


@contextmanager
def started_fleet(config: RunConfig, history: Beats, interrupts: Interrupts, view: View) -> Iterator[Fleet]:
    """The roles, running; on the way out, whatever the reason, all of them have ended.

    Raises StreamDPOError where the learner could not end: what it learned since its newest checkpoint is lost.
    """
    fleet = Fleet(config, history=history)
    broken: list[Ended] = []
    try:
        yield fleet
    finally:
        broken = fleet.stop(interrupts.hurry)
        for process, error, _ in broken:
            view.event(f"{process.role_id} did not end well: {error}")
    for process, error, _ in broken:
        if process.kind == "learner" and not interrupts.hurry.is_set():
            raise StreamDPOError(
                f"the learner did not end well, so its newest steps may be in no checkpoint: {error}",
                where=str(log_path(config, process.role_id)),
                do="The same command trains them again, from the newest checkpoint.",
            )


def _watch(config: RunConfig, fleet: Fleet, watch: Watch, interrupts: Interrupts, started_s: float) -> str:
    """Why the run is over."""
    looked_s = -LOOK_S
    while not interrupts.asked.is_set():
        reasons = [watch.ended(ended) for ended in fleet.poll(POLL_S)]
        elapsed_s = time.monotonic() - started_s
        if any(reasons):
            watch.look(elapsed_s)
            return next(filter(None, reasons))
        if elapsed_s - looked_s < LOOK_S:
            continue
        looked_s = elapsed_s
        watch.look(elapsed_s)
        if (reason := limit(config, watch.newest, elapsed_s)) is not None:
            return reason
    return BY_SIGNAL


def limit(config: RunConfig, newest: Measurement | None, elapsed_s: float) -> str | None:
    """Why the run ends by its own settings; None while it goes on."""
    target, minutes = config.stop.heldout_reward, config.stop.max_minutes
    if target is not None and newest is not None and newest.mean >= target:
        return f"held-out reward {newest.mean:.3f} has reached {target:g}"
    if minutes is not None and elapsed_s >= 60 * minutes:
        return f"{minutes:g} minutes have passed"
    return None
