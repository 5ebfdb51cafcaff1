"""What a run came to, gathered from its records one at a time: pure aggregation, no log, no drawing.

    RunSummary(policy) -> add_scored / add_pair / add_feedback / add_weights, in any order -> figures to draw and print

Memory is bounded whatever the length of the run: a line keeps at most `MAX_POINTS` means, a histogram at most
`MAX_BINS` counts, a held-out round's rewards stay until it is complete, and of pairs and versions only the first
and the last few stay.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from streaming.evaluation import Key, Measurement, measurement, merit
from streaming.records import Feedback, Pair, ScoredGroup, Version, WeightVersion
from streaming.selection.margins import combined

MAX_POINTS = 160
"""Means that a line keeps: more than a plot half a page wide can show apart."""

MAX_BINS = 4096
"""Counts that a histogram keeps; it is drawn with far fewer."""

FINEST_BIN = 2.0**-10
"""Width of a histogram's bins before it holds many values: finer than any plot shows."""

NUM_EXAMPLES = 3
"""Pairs shown of the run's beginning, and as many of its end."""

MAX_REASONS = 100
"""Rows of the table of endings; a reason that is different every time must not fill the page."""

OTHER = "(other reasons)"

NUM_FIRST_VERSIONS = 2
NUM_LAST_VERSIONS = 8


class Mean:
    """A running mean with its standard error (Welford's method)."""

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0
        self._squares = 0.0  # sum of squared differences to the mean

    def add(self, value: float) -> None:
        self.count += 1
        difference = value - self.value
        self.value += difference / self.count
        self._squares += difference * (value - self.value)

    def merge(self, other: "Mean") -> None:
        """As if every value of `other` had been added."""
        count = self.count + other.count
        difference = other.value - self.value
        self._squares += other._squares + difference**2 * self.count * other.count / count
        self.value += difference * other.count / count
        self.count = count

    @property
    def standard_error(self) -> float | None:
        """None below two values: one value says nothing about its error."""
        if self.count < 2:
            return None
        return math.sqrt(self._squares / (self.count - 1) / self.count)


class Point(NamedTuple):
    """A mean at a place of the x axis."""

    x: float
    mean: float
    standard_error: float | None
    num_values: int


class Line:
    """Means of values by a whole number (a step, a version). Where it grows too long, neighbours share a point."""

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.width = 1  # whole numbers per point
        self._max_points = max_points
        self._bins: dict[int, tuple[Mean, Mean]] = {}  # mean of x, mean of the value

    def add(self, x: int, value: float) -> None:
        """Add a value; one that is not finite has no place in a plot and is left out."""
        if not math.isfinite(value):
            return
        x_mean, mean = self._bins.setdefault(x // self.width, (Mean(), Mean()))
        x_mean.add(x)
        mean.add(value)
        while len(self._bins) > self._max_points:
            self._coarsen()

    def points(self) -> list[Point]:
        return [
            Point(x.value, mean.value, mean.standard_error, mean.count) for _, (x, mean) in sorted(self._bins.items())
        ]

    def _coarsen(self) -> None:
        self.width *= 2
        before, self._bins = self._bins, {}
        for index, (x_mean, mean) in before.items():
            kept = self._bins.setdefault(index // 2, (Mean(), Mean()))
            kept[0].merge(x_mean)
            kept[1].merge(mean)


Lines = dict[int, Line]
"""A line per epoch of the learner: a restart begins a new one, because its numbers may be lower."""


class Histogram:
    """Counts by value, in bins that widen as the values spread."""

    def __init__(self, max_bins: int = MAX_BINS) -> None:
        self.count = 0
        self._width = FINEST_BIN
        self._max_bins = max_bins
        self._bins: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """Count a value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self.count += 1
        self._bins[math.floor(value / self._width + 0.5)] += 1
        while len(self._bins) > self._max_bins:
            self._width *= 2
            before, self._bins = self._bins, Counter()
            for index, count in before.items():
                self._bins[index // 2] += count

    def values(self) -> list[tuple[float, int]]:
        """(value, count), ascending; a value is right to the width of a bin, and exact where it is a whole number."""
        return [(index * self._width, count) for index, count in sorted(self._bins.items())]


T = TypeVar("T")


class Ends(Generic[T]):
    """What belongs to the few least and the few greatest of all keys. What lies between is forgotten for good."""

    def __init__(self, *, num_first: int, num_last: int) -> None:
        self._num_first = num_first
        self._num_last = num_last
        self._kept: dict[tuple[int, ...], T] = {}

    def keep(self, key: tuple[int, ...], make: Callable[[], T]) -> T | None:
        """What is kept under this key, made now where the key is new; None where it lies between the ends."""
        if key not in self._kept:
            self._kept[key] = make()
            if len(self._kept) > self._num_first + self._num_last:
                del self._kept[sorted(self._kept)[self._num_first]]
        return self._kept.get(key)

    @property
    def first(self) -> list[T]:
        return [self._kept[key] for key in sorted(self._kept)[: self._num_first]]

    @property
    def last(self) -> list[T]:
        """The greatest ones that are not among the first."""
        return [self._kept[key] for key in sorted(self._kept)[self._num_first :]]


class Sampled(NamedTuple):
    """A weight version and the rewards of the candidates that it sampled alone."""

    version: Version
    rewards: Mean


class HeldOut(NamedTuple):
    """A held-out measurement and how sure it is."""

    measured: Measurement
    standard_error: float | None  # over prompts


class Rounds:
    """Held-out measurements; a round's rewards are kept only until it is complete."""

    def __init__(self) -> None:
        self._complete: dict[Key, HeldOut] = {}
        self._open: dict[Key, dict[int, float]] = {}  # the first reward of each request
        self._sizes: dict[int, int] = {}  # by round

    def add(self, feedback: Feedback) -> None:
        """A held-out answer. One without a single version, a round or a reward belongs to no measurement."""
        if feedback.round is None or feedback.version is None or feedback.mean_reward is None:
            return
        key = (feedback.round, feedback.version)
        if key in self._complete:
            return
        self._sizes[feedback.round] = feedback.round_size or 0
        rewards = self._open.setdefault(key, {})
        rewards.setdefault(feedback.request_number, feedback.mean_reward)
        if len(rewards) == feedback.round_size:
            self._complete[key] = self._held_out(key, self._open.pop(key))

    def complete(self) -> list[HeldOut]:
        """Measurements over every prompt of their round, by round."""
        return [self._complete[key] for key in sorted(self._complete)]

    def incomplete(self) -> list[HeldOut]:
        """Measurements under way, and those that a change of version broke, by round."""
        return [self._held_out(key, self._open[key]) for key in sorted(self._open)]

    @property
    def best(self) -> HeldOut | None:
        """The best complete measurement."""
        return max(self.complete(), key=lambda one: merit(one.measured), default=None)

    def _held_out(self, key: Key, rewards: dict[int, float]) -> HeldOut:
        over_prompts = Mean()
        for reward in rewards.values():
            over_prompts.add(reward)
        measured = measurement(key, list(rewards.values()), size=self._sizes[key[0]])
        return HeldOut(measured, over_prompts.standard_error)


class Settled(NamedTuple):
    """One row of the table of endings."""

    ending: str
    stage: str
    route: str
    reason: str


@dataclass
class RunSummary:
    """Everything that the page says about samples, pairs and steps of one policy."""

    policy: str
    first_s: float = math.inf  # Unix time of the oldest record
    last_s: float = -math.inf
    num_candidates: int = 0
    num_mixed: int = 0  # candidates whose tokens come from several versions
    num_unrewarded: int = 0
    training: Lines = field(default_factory=dict)
    mixed: Lines = field(default_factory=dict)  # by the version that began the candidate
    external: Histogram = field(default_factory=Histogram)
    implicit: Histogram = field(default_factory=Histogram)
    routes: Counter[str] = field(default_factory=Counter)
    endings: Counter[Settled] = field(default_factory=Counter)
    held_out: Rounds = field(default_factory=Rounds)
    trained_staleness: Histogram = field(default_factory=Histogram)
    dropped_staleness: Histogram = field(default_factory=Histogram)
    chosen: Lines = field(default_factory=dict)
    rejected: Lines = field(default_factory=dict)
    dpo_loss: Lines = field(default_factory=dict)
    sft_loss: Lines = field(default_factory=dict)
    num_examples: int = 0
    examples: Ends[Pair] = field(default_factory=lambda: Ends(num_first=NUM_EXAMPLES, num_last=NUM_EXAMPLES))
    versions: Ends[Sampled] = field(
        default_factory=lambda: Ends(num_first=NUM_FIRST_VERSIONS, num_last=NUM_LAST_VERSIONS)
    )
    newest: WeightVersion | None = None  # of those published

    @property
    def seconds(self) -> float | None:
        """From the oldest record to the newest."""
        return self.last_s - self.first_s if self.last_s >= self.first_s else None


def add_time(summary: RunSummary, time_s: float) -> None:
    """A record was written at this time."""
    summary.first_s = min(summary.first_s, time_s)
    summary.last_s = max(summary.last_s, time_s)


def add_scored(summary: RunSummary, scored: ScoredGroup) -> None:
    """Rewards of the candidates, by the weight version that sampled them."""
    candidates = scored.group.candidates
    if scored.group.policy != summary.policy:
        return
    summary.num_candidates += len(candidates)
    for candidate, reward in zip(candidates, combined(scored.rewards, len(candidates)), strict=True):
        if reward is None:
            summary.num_unrewarded += 1
        if candidate.version is not None:
            _add_version(summary, candidate.version, reward)
        elif candidate.spans:
            summary.num_mixed += 1
            _add(summary.mixed, candidate.spans[0].version, reward)


def _add_version(summary: RunSummary, version: Version, reward: float | None) -> None:
    _add(summary.training, version, reward)
    sampled = summary.versions.keep((version.epoch, version.number), lambda: Sampled(version, Mean()))
    if sampled is not None and reward is not None:
        sampled.rewards.add(reward)


def add_pair(summary: RunSummary, pair: Pair) -> None:
    """Margins and routes of the examples, and a few to read."""
    summary.routes[pair.route] += 1
    summary.num_examples += 1
    summary.examples.keep((pair.request_number, pair.index), lambda: pair)
    if pair.margins.external is not None:
        summary.external.add(pair.margins.external)
    if pair.margins.implicit is not None:
        summary.implicit.add(pair.margins.implicit)


def add_feedback(summary: RunSummary, feedback: Feedback) -> None:
    """How an example ended, what the learner saw at its step, and held-out rewards."""
    if feedback.policy != summary.policy:
        return
    ended = Settled(feedback.ending, feedback.stage, feedback.route or "", feedback.reason)
    if len(summary.endings) >= MAX_REASONS and ended not in summary.endings:
        ended = ended._replace(reason=OTHER)
    summary.endings[ended] += 1
    if feedback.ending == "evaluated":
        summary.held_out.add(feedback)
    if feedback.ending != "consumed":
        return
    if feedback.staleness is not None:
        counts = summary.dropped_staleness if feedback.reason else summary.trained_staleness
        counts.add(feedback.staleness)
    if feedback.step is not None and feedback.epoch is not None and not feedback.reason:
        _add_step(summary, feedback, Version(feedback.epoch, feedback.step))


def _add_step(summary: RunSummary, feedback: Feedback, step: Version) -> None:
    _add(summary.sft_loss if feedback.route == "sft" else summary.dpo_loss, step, feedback.loss)
    if feedback.rejected_logprob is not None:  # an SFT example has no other side to compare with
        _add(summary.chosen, step, feedback.chosen_logprob)
        _add(summary.rejected, step, feedback.rejected_logprob)


def add_weights(summary: RunSummary, version: WeightVersion) -> None:
    """A version was published."""
    is_newer = summary.newest is None or version.version > summary.newest.version
    if version.policy == summary.policy and is_newer:
        summary.newest = version


class Routed(NamedTuple):
    """One row of the table of routes."""

    route: str
    reason: str
    num_groups: int


def routed(summary: RunSummary) -> list[Routed]:
    """Where the selector sent the groups: examples by route, then the dropped ones by reason, most of them first."""
    made = [Routed(route, "", summary.routes[route]) for route in ("dpo", "sft") if summary.routes[route]]
    dropped: Counter[str] = Counter()
    for settled, count in summary.endings.items():
        if settled.ending == "dropped" and settled.stage.startswith("selector"):
            dropped[settled.reason] += count
    return made + [Routed("drop", reason, count) for reason, count in dropped.most_common()]


def _add(lines: Lines, at: Version, value: float | None) -> None:
    if value is not None:
        lines.setdefault(at.epoch, Line()).add(at.number, value)
