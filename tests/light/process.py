"""One role of a light run, in a process of its own: forked from one that has imported everything.

forked -> its fate is set -> log, heartbeat, role -> (stopped | the end of the data | its fate)
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from actors.generator import Generator
from deploy.roles import BUILDERS, Parts, Process, Role, settings_from
from streaming import topics
from streaming.config import LogConfig
from streaming.heartbeat import NO_HISTORY, Heartbeat
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import Entry, Log, Output
from streaming.log.sqlite import SQLiteLog
from streaming.metrics import Metrics
from streaming.rewards import build_rewards
from streaming.scorer import Scorer
from streaming.scoring import Pricing
from tests.fakes import CrashingConsumer, CrashingLog
from tests.light.fates import APPEND, APPENDED, BEAT, READ, Fate, JumpyClock, Moments
from tests.light.parts import FixedReference, RandomEngine

BEAT_S = 0.2
"""Ten times as often as in a real run, which is a hundred times as long."""

LEASE_S = 1.0
"""A member that was not heard of for so long is dead: a busy machine does not bury the living, as a rule."""

MAX_RECORD_BYTES = 2**20


class Life(NamedTuple):
    """One start of a role."""

    role_id: str
    start: int  # from 1
    folder: Path  # of the run
    settings: str  # as `deploy.roles.settings_of` writes them
    log: LogConfig
    fate: Fate | None

    @property
    def process(self) -> Process:
        role, _, index = self.role_id.rpartition("-")
        return Process(role, int(index))

    def file(self, suffix: str) -> Path:
        return self.folder / "lives" / f"{self.role_id}.{self.start}.{suffix}"


class Told(msgspec.Struct, frozen=True):
    """A line of a history: an append that was acknowledged."""

    time_s: float  # monotonic
    records: list[tuple[str, int, int, bytes, bytes]]  # topic, partition, offset, key, value


class WatchedLog(CrashingLog):
    """A log whose requests are moments, and whose acknowledged appends are history."""

    def __init__(self, log: Log, moments: Moments, history: Path) -> None:
        super().__init__(log)
        self.moments = moments
        self._history = os.open(history, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        written = list(outputs)
        is_beat = all(one.topic == topics.ROLES.name for one in written)
        self.moments.pass_by(BEAT if is_beat else APPEND)
        places = self.log.append(written)
        if not is_beat:
            records = [
                (*self._where(one, place), one.key, one.value) for one, place in zip(written, places, strict=True)
            ]
            os.write(self._history, msgspec.json.encode(Told(time.monotonic(), records)) + b"\n")
        self.moments.pass_by(BEAT if is_beat else APPENDED)
        return places

    def subscribe(self, group: str, topics: Sequence[str]) -> "WatchedConsumer":
        return WatchedConsumer(self, self.log.subscribe(group, topics))

    def pass_by(self, place: str) -> None:
        self.moments.pass_by(place)

    def close(self) -> None:
        super().close()
        os.close(self._history)

    @staticmethod
    def _where(output: Output, place: tuple[int, int]) -> tuple[str, int, int]:
        return output.topic, *place


class WatchedConsumer(CrashingConsumer):
    """A member of a group whose reads are moments too."""

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        entries = super().read(max_records=max_records, timeout_s=timeout_s)
        if entries:
            self._log.pass_by(READ)
        return entries


def histories(folder: Path) -> dict[str, list[Told]]:
    """What every start of every role was told, by "ROLE-ID.START"."""
    return {path.name.removesuffix(".history"): list(_lines(path)) for path in folder.glob("lives/*.history")}


def _lines(path: Path) -> Iterator[Told]:
    yield from (msgspec.json.decode(line, type=Told) for line in path.read_bytes().splitlines())


def open_light_log(config: LogConfig, run: str, clock: Callable[[], float]) -> Log:
    """A log whose members are dead soon."""
    scheme, _, path = config.url.partition(":///")
    if scheme == "sqlite":
        return SQLiteLog(
            Path(path),
            run=run,
            max_record_bytes=MAX_RECORD_BYTES,
            max_bytes=config.max_bytes,
            lease_s=LEASE_S,
            clock=clock,
        )
    return KafkaLog(config.url, run=run, max_record_bytes=MAX_RECORD_BYTES, config=config.kafka)


def be(life: Life) -> None:
    """The whole life."""
    _print_to(life.file("log"))
    threading.Thread(target=_die_with_the_test, daemon=True).start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    clock = JumpyClock(life.folder / "clock")
    time.time = clock  # of this process: whoever asks for the time
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    config, process = settings_from(life.settings), life.process
    scheme, _, path = life.log.url.partition(":///")
    file = Path(path) if scheme == "sqlite" else None
    moments = Moments(life.fate, file=file, awake=life.file("awake"))
    with WatchedLog(open_light_log(life.log, config.name, clock), moments, life.file("history")) as log:
        if life.fate is not None and process.kind == "learner":
            moments.watch_files(life.folder)
        metrics = Metrics(process.role)
        heartbeat = Heartbeat(log, metrics, role=process.role, index=process.index, interval_s=BEAT_S)
        try:
            _build(Parts(config, process, log, metrics, heartbeat, NO_HISTORY)).run(stop)
        except BaseException as error:
            heartbeat.close(health="failed", message=f"{type(error).__name__}: {error}")
            life.file("error").write_text(f"{type(error).__name__}: {error}")
            raise
        heartbeat.close(message=heartbeat.state.message)


def _die_with_the_test() -> None:
    """A test that is killed leaves no role behind."""
    test = multiprocessing.parent_process()
    assert test is not None
    test.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _print_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())


def _build(parts: Parts) -> Role:
    return {"generator": _generator, "scorer": _scorer}.get(parts.process.kind, BUILDERS[parts.process.kind])(parts)


def _generator(parts: Parts) -> Role:
    config = parts.config
    return Generator(
        parts.log, parts.metrics, parts.heartbeat, make_engine=RandomEngine.start, config=config.generation,
        policy=config.policy, model=Path(config.model),
    )  # fmt: skip


def _scorer(parts: Parts) -> Role:
    config = parts.config
    return Scorer(
        parts.log, parts.metrics, parts.heartbeat, sources=build_rewards(config.rewards, config.scoring),
        pricing=[Pricing(FixedReference())], config=config.scoring, policy=config.policy,
    )  # fmt: skip
