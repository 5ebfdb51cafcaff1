"""A seed's whole life: what is planned, who is started and killed, what is found in the end.

    plan -> faults while the run works -> healed -> end of the data -> (dead letters sent again -> end)* -> stopped
                                                                                                            -> checked

A launcher that is always there starts again whatever has died, as `deploy/watch.py` does. Of a process that stands
still it knows nothing, takes it for dead sooner or later, and starts its heir: so there are zombies.
"""

import contextlib
import errno
import random
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from deploy.redrive import Wanted, carry_out
from deploy.redrive import plan as plan_redrive
from learner import checkpoint
from streaming import topics
from streaming.books import Ledger, carry, newest_carried
from streaming.errors import EngineError, LogError, NotReadyError, SupersededError, TrimmedError, WeightsError
from streaming.fencing import read_issuers
from streaming.heartbeat import beats
from streaming.log.protocol import Entry, Output
from streaming.records import FINAL_ENDINGS, Feedback, Group, PromptRequest, decode
from streaming.wire import REFERENCE_MARK
from tests.checker import Violation, check, unfinished
from tests.fakes import Crash, CrashingLog
from tests.simulation.fibers import EPOCH_S, Process, World
from tests.simulation.memory_log import MemoryLog, Store
from tests.simulation.parts import WRONG_LOGPROB, Faults, read_parameters
from tests.simulation.roles import POLICY, Cast, Run, Settings

MAX_STEPS = 30_000
"""A run takes a few thousand steps: one that takes so many does not end."""

MAX_STARTS = 100
"""A role is killed some ten times at most: one that is started so often dies of itself."""

LOOK_S = 0.5
"""Between two looks of the launcher."""

FAULTY_S = 20.0
"""For so long things go wrong; then the world is healed."""

CLOCK_S = 3600.0
"""A clock jumps forwards or back by so much at most, and may be set right again."""

KEPT_REQUESTS = 2
"""Newest requests whose accounts the books carry: the others are closed as soon as they have ended."""

OLD_S = 12.0
"""Only a zombie is so far behind with its reading."""

KEPT = 8
"""Entries before the committed offset that retention leaves: more than a generator has in flight per partition."""

POISON = (b"", b"\xc1", b"not msgpack", b"\x81\xa6number\xa3two", REFERENCE_MARK + b"\x80")
"""Bytes that are no record of any topic."""

DAMAGED = {topics.CANDIDATES.name, topics.SCORED.name, topics.pairs(POLICY).name}
"""Topics whose records may become unreadable on their way, under the keys that they had."""

POISONED = topics.all_topics(POLICY)

HELD_BACK: dict[tuple[str, str], str] = {}
"""Faults (kind, topic of the append) whose violations are known and wait to be mended: why. `--all` lets them come."""


@dataclass(frozen=True)
class Plan:
    """What a seed is about."""

    settings: Settings
    rates: dict[str, float]  # of faults, per moment at which they may come
    held_back: frozenset[tuple[str, str]] = frozenset(HELD_BACK)


@dataclass
class Outcome:
    """How a seed ended."""

    seed: int
    violations: list[Violation]
    faults: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0
    recovery_s: float = 0.0  # from the last fault to the end of the data
    trace: list[str] | None = None
    fingerprint: int = 0  # of everything that was appended, in its order
    options: str = ""  # that a replay needs


def plan(seed: int) -> Plan:
    """Sizes and faults; about half of the kinds of fault are there in any one seed."""
    chance = random.Random(f"plan {seed}")
    batch_size, concurrency, generators = chance.randint(1, 3), chance.randint(1, 3), chance.randint(1, 2)
    settings = Settings(
        num_requests=chance.randint(3, 10),
        num_held_out=chance.choice([0, 0, 2]),
        pipeline_depth=batch_size + concurrency * generators + chance.randint(0, 3),
        concurrency=concurrency,
        batch_size=batch_size,
        max_staleness=chance.randint(2, 6),
        checkpoint_every=chance.randint(1, 3),
        sync_every=chance.choice([1, 1, 2]),
        num_generators=generators,
        num_scorers=chance.randint(1, 2),
        num_selectors=chance.randint(1, 2),
    )
    most = {
        "kill": 0.004, "zombie": 0.002, "stall": 0.002,  # per step
        "unknown": 0.03, "refused": 0.02, "duplicate": 0.05, "partial": 0.03, "crash": 0.03,  # per append
        "short": 0.3,  # per read
        "engine": 0.05, "load": 0.1, "misplaced": 0.1, "reference": 1.0, "non_finite": 0.1, "disk": 0.1,
        "poison": 0.2, "trim": 0.3,  # per look of the launcher
        "redrive": 0.3,  # per look of the launcher
        "damaged": 0.3,  # per record
        "clock": 0.3,  # per look of the launcher
    }  # fmt: skip
    rates = {kind: chance.random() * rate for kind, rate in most.items() if chance.random() < 0.5}
    return Plan(settings, rates)


def simulate(seed: int, *, cast: Cast | None = None, is_traced: bool = False, planned: Plan | None = None) -> Outcome:
    """One run under the seed's schedule and faults. The same seed gives the same run."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="simulation-", dir=memory if memory.is_dir() else None))
    try:
        return _Simulation(seed, planned or plan(seed), cast or Cast(), directory, is_traced).outcome()
    finally:
        shutil.rmtree(directory)


def simulate_all(seed: int, *, is_traced: bool = False) -> Outcome:
    """The seed with the faults that are held back, too."""
    outcome = simulate(seed, is_traced=is_traced, planned=replace(plan(seed), held_back=frozenset()))
    return replace(outcome, options=" --all")


class _Simulation:
    def __init__(self, seed: int, planned: Plan, cast: Cast, directory: Path, is_traced: bool) -> None:
        self._seed = seed
        self._world = World(seed, is_traced=is_traced)
        self._store = Store(lambda: self._world.now_s)
        self._held_back = planned.held_back
        calm = {kind for kind in planned.rates if (kind, "") in planned.held_back}
        self._faults = Faults(**{kind: rate for kind, rate in planned.rates.items() if kind not in calm})
        self._run = Run(self._store, directory, planned.settings, self._faults, cast)
        self._current: dict[str, Process] = {}
        self._starts: Counter[str] = Counter()
        self._counts = self._faults.counts
        self._deaths: list[Violation] = []
        (directory / "model").mkdir()
        self._store.fault = self._append_fault
        self._store.damage = self._damage
        self._store.shorten = self._shorten
        self._world.on_step = self._on_step

    def outcome(self) -> Outcome:
        for role_id in self._run.role_ids():
            self._start(role_id)
        self._world.at(LOOK_S, self._look)
        self._world.at(FAULTY_S, self._heal)
        try:
            is_over = self._world.run(self._is_over, max_steps=MAX_STEPS)
            while is_over and self._is_reopened():
                self._run_again()
                is_over = self._world.run(self._is_over, max_steps=MAX_STEPS)
            stuck = [] if is_over else self._stuck("is not over")
            recovery_s = self._world.now_s - self._faults.newest_s
            self._run.stopping.is_set = True
            if not self._world.run(self._is_stopped, max_steps=self._world.num_steps + MAX_STEPS // 4):
                stuck += self._stuck("does not stop")
        finally:
            self._world.bury()
        return Outcome(
            self._seed,
            [*stuck, *self._deaths, *self._violations()],
            self._counts,
            self._world.num_steps,
            recovery_s,
            self._world.trace,
            self._fingerprint(),
        )

    def _stuck(self, what: str) -> list[Violation]:
        living = [str(process) for process in self._world.processes if process.is_alive]
        return [Violation("liveness", f"the run {what} after {self._world.num_steps} steps; alive", (*living,))]

    def _fingerprint(self) -> int:
        places = [(entry.topic, entry.partition, entry.offset, entry.key) for entry in self._store.history]
        return zlib.crc32(repr(places).encode())

    # Who lives

    def _start(self, role_id: str) -> None:
        self._starts[role_id] += 1
        if self._starts[role_id] == MAX_STARTS:
            self._deaths.append(Violation("liveness", f"it was started {MAX_STARTS} times", (role_id,)))
        process = self._world.process(role_id, self._starts[role_id])
        self._current[role_id] = process
        self._world.tell(process, "starts")
        process.begin(self._run.be)

    def _look(self) -> None:
        """The launcher: whatever has died is started again; and what happens to the log from outside."""
        for role_id, process in self._current.items():
            if process.is_alive or (process.is_over and process.error is None):
                continue
            self._judge(process)
            self._start(role_id)
        scheduler, learner = self._current["scheduler-0"], self._current["learner-0"]
        if self._counts["redrive"] and scheduler.is_over and learner.is_alive:  # reopened when the run was at its end
            self._start("scheduler-0")
        if self._faults.strikes_world(self._world, "poison"):
            self._poison()
        if self._faults.strikes_world(self._world, "clock"):
            self._world.wrong_by_s = (self._world.chance.random() - 0.5) * 2 * CLOCK_S
        if self._faults.strikes_world(self._world, "trim"):
            self._trim()
        if self._faults.strikes_world(self._world, "redrive"):
            self._redrive()
        if not self._run.stopping.is_set:
            self._world.at(LOOK_S * (0.5 + self._world.chance.random()), self._look)

    def _is_reopened(self) -> bool:
        """Whether dead letters were sent again when the run was coming to its end: then it is run again."""
        if not self._counts["redrive"] or self._deaths:
            return False
        return bool(unfinished(self._store.archive(), policy=POLICY, checkpoints=self._run.checkpoints))

    def _run_again(self) -> None:
        self._run.stopping.history = beats(MemoryLog(self._store))
        self._heal()
        for role_id in ("scheduler-0", "learner-0"):
            self._start(role_id)

    def _judge(self, process: Process) -> None:
        """Every death has to be one that a fault explains."""
        error = process.error
        is_zombie = process.resumes_s > 0
        known: tuple[type[BaseException], ...] = (LogError, EngineError, WeightsError, NotReadyError, SupersededError)
        is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        is_trimmed = isinstance(error, TrimmedError) and not is_zombie
        if error is None or is_full or (isinstance(error, known) and not is_trimmed):
            return
        self._deaths.append(Violation("died", f"{process} of {type(error).__name__}: {error}", (process.role_id,)))

    def _is_over(self) -> bool:
        """At the end of the data, and no zombie is left to come back; or at the first death that nothing explains."""
        if self._deaths:
            return True
        ends = [self._current[role_id] for role_id in ("scheduler-0", "learner-0")]
        is_ended = all(process.is_over and process.error is None for process in ends)
        return is_ended and all(
            process.resumes_s <= self._world.now_s for process in self._world.processes if process.is_alive
        )

    def _is_stopped(self) -> bool:
        return not any(process.is_alive for process in self._world.processes)

    # What goes wrong

    def _on_step(self, process: Process) -> None:
        if self._faults.strikes(process, "kill"):
            process.kill()
        elif self._faults.strikes(process, "stall"):  # shorter than a lease
            process.stand_still(1 + 8 * self._world.chance.random())
        elif process is self._current[process.role_id] and self._faults.strikes(process, "zombie"):
            process.stand_still(12 + 12 * self._world.chance.random())
            self._world.at(1 + 10 * self._world.chance.random(), lambda: self._replace(process))

    def _replace(self, process: Process) -> None:
        """The launcher gives a process up that stands still, and does not know that it will go on."""
        if self._current[process.role_id] is process and process.is_alive and not self._run.stopping.is_set:
            self._start(process.role_id)

    def _append_fault(self, process: Process, outputs: Sequence[Output]) -> str | None:
        topic = outputs[0].topic
        kinds = ("unknown", "refused", "duplicate", "partial", "crash")
        possible = [kind for kind in kinds if (kind, topic) not in self._held_back]
        return next((kind for kind in possible if self._faults.strikes(process, kind)), None)

    def _damage(self, process: Process, outputs: Sequence[Output]) -> Sequence[Output]:
        return [
            one._replace(value=POISON[1]) if one.topic in DAMAGED and self._faults.strikes(process, "damaged") else one
            for one in outputs
        ]

    def _shorten(self, num: int) -> int:
        """A read may return less than there is, but not nothing."""
        if num > 1 and self._world.chance.random() < self._faults.rates.get("short", 0.0):
            return 1 + int(self._world.chance.random() * num)
        return num

    def _poison(self) -> None:
        chance = self._world.chance
        topic = POISONED[int(chance.random() * len(POISONED))]
        value = POISON[int(chance.random() * len(POISON))]
        known = [*self._store.newest(topic.name)] if topic.compacted else []  # there it comes under records' keys too
        key = [*known, b"poison"][int(chance.random() * (len(known) + 1))]
        self._store.append([Output(topic.name, key, value)])

    def _redrive(self) -> None:
        """A person sends all dead letters again; while things go wrong, the command is killed now and then."""
        if self._run.stopping.is_set:
            return
        log = MemoryLog(self._store)
        chance = self._world.chance.random()
        crashing = CrashingLog(log, after_append=1 + int(chance * 6) if self._faults.rates else None)
        with contextlib.suppress(Crash):
            carry_out(crashing, plan_redrive(log, [POLICY], Wanted()))

    def _heal(self) -> None:
        """Nothing goes wrong any more; and what a redrive that was killed has reopened is sent."""
        self._faults.heal()
        if self._counts["redrive"]:
            self._redrive()

    def _trim(self) -> None:
        """Retention takes what every reader is through with, but for what it still has to recognise copies by."""
        for group, topic in (("scorer", topics.CANDIDATES), (topics.selectors(POLICY), topics.SCORED)):
            for place, offset in self._store.group(group).committed.items():
                assert place[0] == topic.name
                self._store.trim(place, offset - KEPT)
        saved = checkpoint.newest(self._run.checkpoints)
        if saved is not None:
            for name, number, offset in saved.state.reader.offsets:
                self._store.trim((name, number), offset)
        if "redrive" not in self._faults.rates:
            self._trim_books()

    def _trim_books(self) -> None:
        """Of feedback and of requests that have ended, what the carried balance holds and all have read long ago."""
        log = MemoryLog(self._store)
        carry(log, [POLICY], kept=KEPT_REQUESTS)
        carried = newest_carried(log, POLICY)
        ledger = Ledger(POLICY, carried)
        committed = log.committed("generators", [topics.PROMPTS.name])
        for topic, number, offset in carried.places if carried else []:
            place = (topic, number)
            before = self._store.partition(place)[: min(offset, committed.get(place, offset))]
            kept = [one.offset for one in before if self._is_needed(one, ledger)]
            self._store.trim(place, min(kept, default=len(before)))

    def _is_needed(self, entry: Entry, ledger: Ledger) -> bool:
        """Retention is longer than a role stands still, and than a request takes to end."""
        is_new = entry.time_s > self._world.now_s - OLD_S
        is_request = entry.topic == topics.PROMPTS.name and entry.value not in POISON
        return is_new or (is_request and not ledger.has_ended(decode(PromptRequest, entry.value).number))

    # What is found

    def _violations(self) -> list[Violation]:
        log, run = self._store.archive(), self._run
        found = check(log, policy=POLICY, checkpoints=run.checkpoints, max_staleness=run.settings.max_staleness)
        found += unfinished(log, policy=POLICY, checkpoints=run.checkpoints)
        return [*found, *self._wrong_weights(), *self._too_deep(), *self._wrong_model()]

    def _wrong_weights(self) -> list[Violation]:
        """Nothing that an engine sampled from misplaced weights is in the log."""
        groups = [decode(Group, entry.value) for entry in self._entries(topics.CANDIDATES)]
        wrong = [
            group.request.number
            for group in groups
            if any(WRONG_LOGPROB in candidate.logprobs for candidate in group.candidates)
        ]
        return [Violation("parity", "requests answered by misplaced weights", (*wrong,))] if wrong else []

    def _too_deep(self) -> list[Violation]:
        """At every moment, the training requests issued and not ended fit into the pipeline."""
        outstanding: dict[int, None] = {}
        ended: set[int] = set()
        deepest = 0
        issuers = read_issuers(self._store.archive())
        for entry in self._store.history:
            if entry.value in POISON:
                continue
            if entry.topic == topics.PROMPTS.name:
                request = decode(PromptRequest, entry.value)
                is_new = request.number not in ended and not issuers.is_void(request.claim, entry)
                if request.purpose == "train" and is_new:
                    outstanding[request.number] = None
            elif entry.topic == topics.FEEDBACK.name:
                one = decode(Feedback, entry.value)
                if one.ending in FINAL_ENDINGS | {"consumed"}:
                    outstanding.pop(one.request_number, None)
                    ended.add(one.request_number)
            deepest = max(deepest, len(outstanding))
        depth = self._run.settings.pipeline_depth
        return [Violation("pacing", f"requests outstanding, of {depth}", (deepest,))] if deepest > depth else []

    def _wrong_model(self) -> list[Violation]:
        """The newest checkpoint's model was trained once on everything that is called trained, and on nothing else."""
        saved = checkpoint.newest(self._run.checkpoints)
        parameters = Counter(read_parameters(saved) if saved else [])
        told = {
            one.request_number
            for one in (decode(Feedback, entry.value) for entry in self._entries(topics.FEEDBACK))
            if one.ending == "trained"
        }
        twice = [number for number, count in parameters.items() if count > 1]
        never = told ^ set(parameters)
        found = [Violation("model", "requests that it was trained on twice", (*twice,))] if twice else []
        return found + ([Violation("model", "trained and not told, or the reverse", (*never,))] if never else [])

    def _entries(self, topic: topics.Topic) -> list:
        return [entry for entry in self._store.history if entry.topic == topic.name and entry.value not in POISON]


def story(outcome: Outcome) -> str:
    """What a person needs of a seed that failed."""
    lines = [f"seed {outcome.seed}: {len(outcome.violations)} violations after {outcome.num_steps} steps"]
    lines += [f"  {violation}" for violation in outcome.violations]
    lines += [f"  faults: {dict(sorted(outcome.faults.items()))}"]
    return "\n".join([*lines, f"  replay: python -m tests.simulation{outcome.options} {outcome.seed}"])


__all__ = ["EPOCH_S", "Outcome", "Plan", "plan", "simulate", "simulate_all", "story"]
