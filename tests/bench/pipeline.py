"""A run as a model of discrete events: what pace, staleness and memory come of given costs. Pure; the same seed, the
same run.

    issued -> at its generator -> sampled -> scored -> selected -> waiting for a batch -> trained | dropped | stale

A station is a number of lanes that each work on one thing at a time, first come first served. What a station costs was
measured on real roles (`bench_costs`, `bench_rates`); how long engines and ranks take is an assumption of who asks.
"""

import heapq
import itertools
import random
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

NAMES = ("scheduler", "brokers", "generators", "scorers", "selectors", "learner")
"""The stations."""


class Costs(NamedTuple):
    """Seconds of one core that a group takes."""

    schedule_s: float  # to issue it, and to hear how it ended
    score_s: float
    select_s: float
    lead_s: float  # rank 0 of the learner: to read the example, and to tell how it ended
    broker_s: float  # all brokers together
    hop_s: float  # from an append to whoever reads it


class Plan(NamedTuple):
    """A run's sizes. `sampling_s` is a group's mean time in the engine, `step_s` a step's in the ranks."""

    num_generators: int
    concurrency: int
    sampling_s: float
    num_requests: int  # at least ten
    pipeline_depth: int
    batch_size: int
    step_s: float
    sync_every: int = 1
    publish_s: float = 0.0  # until a version is announced; one at a time
    apply_s: float = 0.0  # until a generator samples with it
    max_staleness: int = 16
    drop_share: float = 0.0
    num_scorers: int = 1
    num_selectors: int = 1
    broker_cores: int = 1
    slow_generators: int = 0  # of them take `slowness` times as long
    slowness: float = 1.0
    shape: float = 4.0  # of the gamma distribution of the sampling time; higher: more alike


class Ran(NamedTuple):
    """What came of it."""

    endings: Counter[str]  # trained, dropped, stale
    ages: Counter[int]  # of the examples trained, in versions
    groups_per_s: float  # that ended, between the first and the last fifth of them: neither filling nor emptying
    use: dict[str, float]  # station -> share of its lanes' time in which they worked meanwhile
    most_outstanding: int
    num_versions: int

    @property
    def bottleneck(self) -> str:
        """The station that has least room."""
        return max(self.use, key=self.use.__getitem__)


class _Station:
    """Lanes, and when each is free."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self._given_s = 0.0
        self._free_s = [0.0] * lanes

    def take(self, now_s: float, seconds: float) -> tuple[float, float]:
        """When the next free lane begins, and when it is done. Callers come in the order of time."""
        begin_s = max(now_s, heapq.heappop(self._free_s))
        heapq.heappush(self._free_s, begin_s + seconds)
        self._given_s += seconds
        return begin_s, begin_s + seconds

    def worked_s(self, now_s: float) -> float:
        """What its lanes have done by now. A lane that has work ahead has no pause in it."""
        return self._given_s - sum(max(0.0, free_s - now_s) for free_s in self._free_s)


class _Group:
    """A request on its way."""

    __slots__ = ("generator", "version")

    def __init__(self, generator: int) -> None:
        self.generator = generator
        self.version = 0  # that began to sample it


class Pipeline:
    """One run. `run` is called once."""

    def __init__(self, plan: Plan, costs: Costs, *, seed: int = 0) -> None:
        self._plan = plan
        self._costs = costs
        self._draw = random.Random(seed)
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = itertools.count()
        self._scheduler = _Station(1)
        self._brokers = _Station(plan.broker_cores)
        self._engines = [_Station(plan.concurrency) for _ in range(plan.num_generators)]
        self._scorers = [_Station(1) for _ in range(plan.num_scorers)]
        self._selectors = [_Station(1) for _ in range(plan.num_selectors)]
        self._learner = _Station(1)
        self._num_issued = 0
        self._outstanding = 0
        self._most_outstanding = 0
        self._pending: deque[_Group] = deque()
        self._is_stepping = False
        self._num_steps = 0
        self._published_s = 0.0  # when the newest version is announced
        self._applied_s: list[float] = [0.0]  # when generators sample with version i
        self._endings: Counter[str] = Counter()
        self._ages: Counter[int] = Counter()
        self._marks: list[
            tuple[float, dict[str, float]]
        ] = []  # when the first and the last fifth ended, who had worked

    def run(self) -> Ran:
        """To the end of the data."""
        for _ in range(min(self._plan.pipeline_depth, self._plan.num_requests)):
            self._issue()
        while self._events:
            self._now_s, _, action, arguments = heapq.heappop(self._events)
            action(*arguments)
        return self._ran()

    def _at(self, time_s: float, action: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), action, arguments))

    def _append(self, time_s: float, then: Callable[..., None], *arguments: object) -> None:
        """Through the brokers to whoever reads it: a third of a group's three large records."""
        self._at(time_s, self._through_brokers, then, arguments)

    def _through_brokers(self, then: Callable[..., None], arguments: tuple[object, ...]) -> None:
        _, done_s = self._brokers.take(self._now_s, self._costs.broker_s / 3)
        self._at(done_s + self._costs.hop_s, then, *arguments)

    def _issue(self) -> None:
        self._num_issued += 1
        self._outstanding += 1
        self._most_outstanding = max(self._most_outstanding, self._outstanding)
        _, done_s = self._scheduler.take(self._now_s, self._costs.schedule_s)
        group = _Group(self._draw.randrange(self._plan.num_generators))
        self._at(done_s + self._costs.hop_s, self._arrive, group)

    def _arrive(self, group: _Group) -> None:
        plan = self._plan
        seconds = self._draw.gammavariate(plan.shape, plan.sampling_s / plan.shape)
        seconds *= plan.slowness if group.generator < plan.slow_generators else 1.0
        begin_s, done_s = self._engines[group.generator].take(self._now_s, seconds)
        self._at(begin_s, self._begin, group)
        self._append(done_s, self._score, group)

    def _begin(self, group: _Group) -> None:
        group.version = bisect_right(self._applied_s, self._now_s) - 1

    def _score(self, group: _Group) -> None:
        station = self._scorers[group.generator % len(self._scorers)]
        _, done_s = station.take(self._now_s, self._costs.score_s)
        self._append(done_s, self._select, group)

    def _select(self, group: _Group) -> None:
        station = self._selectors[group.generator % len(self._selectors)]
        _, done_s = station.take(self._now_s, self._costs.select_s)
        if self._draw.random() < self._plan.drop_share:
            self._at(done_s + self._costs.hop_s, self._end, "dropped")
        else:
            self._append(done_s, self._wait, group)

    def _wait(self, group: _Group) -> None:
        self._pending.append(group)
        self._step_if_full()

    def _step_if_full(self) -> None:
        """As the learner fills a batch: what is too old is dropped, the last batch may be a part."""
        is_last = self._num_issued == self._plan.num_requests and self._outstanding == len(self._pending)
        while not self._is_stepping and self._pending and (len(self._pending) >= self._plan.batch_size or is_last):
            batch: list[_Group] = []
            stale = 0
            while self._pending and len(batch) < self._plan.batch_size:
                group = self._pending.popleft()
                if self._version - group.version > self._plan.max_staleness:
                    stale += 1
                else:
                    batch.append(group)
            if len(batch) < self._plan.batch_size and not is_last:
                self._pending.extend(batch)
                batch = []
            for _ in range(stale):
                self._at(self._now_s + self._costs.hop_s, self._end, "stale")
            self._train(batch)

    def _train(self, batch: list[_Group]) -> None:
        if not batch:
            return
        self._is_stepping = True
        self._ages.update(self._version - group.version for group in batch)
        seconds = self._costs.lead_s * len(batch) + self._plan.step_s
        _, done_s = self._learner.take(self._now_s, seconds)
        self._at(done_s, self._stepped, len(batch))

    def _stepped(self, num_examples: int) -> None:
        for _ in range(num_examples):
            self._at(self._now_s + self._costs.hop_s, self._end, "trained")
        self._num_steps += 1
        if self._num_steps % self._plan.sync_every == 0:
            self._at(max(self._now_s, self._published_s), self._publish)  # waits for the version before
        else:
            self._go_on()

    def _publish(self) -> None:
        self._published_s = self._now_s + self._plan.publish_s
        self._applied_s.append(self._published_s + self._plan.apply_s)
        self._go_on()

    def _go_on(self) -> None:
        self._is_stepping = False
        self._step_if_full()

    def _end(self, ending: str) -> None:
        self._endings[ending] += 1
        if self._endings.total() in (self._plan.num_requests // 5, self._plan.num_requests * 4 // 5):
            worked_s = {name: sum(one.worked_s(self._now_s) for one in self._stations[name]) for name in NAMES}
            self._marks.append((self._now_s, worked_s))
        self._outstanding -= 1
        if self._num_issued < self._plan.num_requests:
            self._issue()
        else:
            self._step_if_full()

    @property
    def _version(self) -> int:
        return len(self._applied_s) - 1

    @property
    def _stations(self) -> dict[str, list[_Station]]:
        shared = [self._scheduler], [self._brokers]
        return dict(zip(NAMES, (*shared, self._engines, self._scorers, self._selectors, [self._learner]), strict=True))

    def _ran(self) -> Ran:
        (first_s, first), (last_s, last) = self._marks
        seconds = last_s - first_s
        lanes = {name: sum(one.lanes for one in found) for name, found in self._stations.items()}
        return Ran(
            endings=self._endings,
            ages=self._ages,
            groups_per_s=(self._plan.num_requests * 4 // 5 - self._plan.num_requests // 5) / seconds,
            use={name: (last[name] - first[name]) / (seconds * lanes[name]) for name in NAMES},
            most_outstanding=self._most_outstanding,
            num_versions=self._version,
        )
