"""When held-out measurements are due, and which weight versions they still need. Values in, values out.

    due -> issued (every held-out prompt once, in one append) -> each request ended -> over: measured, or broken

A round is broken where a version change, a missing reward or a dead letter kept it from being one version's
measurement; it is repeated at once, a few times.
"""

from dataclasses import dataclass, field

from streaming.evaluation import Measurement, measurements, merit
from streaming.records import Feedback, PromptRequest, Version

MAX_REPEATS = 3
"""Broken rounds in a row before the next one waits for its turn: a reward that is always missing stays missing."""


@dataclass
class Round:
    """One measurement, under way or over."""

    number: int
    min_version: Version
    issued: set[int] = field(default_factory=set)  # request numbers
    ended: set[int] = field(default_factory=set)
    evaluated: list[Feedback] = field(default_factory=list)
    measurement: Measurement | None = None
    """Of one version, over every prompt; None while the round is under way, and where it is broken."""

    @property
    def is_over(self) -> bool:
        return self.ended >= self.issued

    def end(self, feedback: Feedback) -> None:
        """One of its requests ended, perhaps again: a request sampled again after a crash may complete a version."""
        self.ended.add(feedback.request_number)
        if feedback.ending == "evaluated":
            self.evaluated.append(feedback)
        if self.is_over:
            self.measurement = next((m for m in measurements(self.evaluated) if m.is_complete), None)


class Rounds:
    """All rounds of a run. Rebuilt after a crash from its requests, then its feedback, each in any order."""

    def __init__(self) -> None:
        self.best: Measurement | None = None
        """The best complete measurement."""

        self.newest: Measurement | None = None
        """The complete measurement of the newest round that has one."""

        self._rounds: dict[int, Round] = {}  # by number
        self._last: Round | None = None
        self._round_of: dict[int, Round] = {}  # by request number
        self._published: list[Version] = []  # the newest one, and what came while a round was under way

    def publish(self, version: Version) -> None:
        """A weight version exists. One older than the newest comes from a learner that was overtaken: it is nothing."""
        if self._published and version < self._published[-1]:
            return
        if not self.in_flight:
            self._published.clear()
        self._published.append(version)

    def issue(self, request: PromptRequest) -> None:
        """A request of a round is durable in the log."""
        assert request.round is not None and request.min_version is not None
        found = self._rounds.setdefault(request.round, Round(request.round, request.min_version))
        found.issued.add(request.number)
        self._round_of[request.number] = found
        self._last = self._rounds[max(self._rounds)]

    def end(self, feedback: Feedback) -> None:
        """A request ended; anything but a request of a round changes nothing."""
        found = self._round_of.get(feedback.request_number)
        if found is None:
            return
        found.end(feedback)
        if (measured := found.measurement) is None:
            return
        if self.newest is None or measured.round > self.newest.round:
            self.newest = measured
        if self.best is None or merit(measured) > merit(self.best):
            self.best = measured

    def forget(self, number: int) -> None:
        """A request has ended, and retention has taken how: no round waits for it."""
        if (found := self._round_of.get(number)) is not None:
            found.ended.add(number)

    def due(self, *, eval_every: int, is_final: bool) -> Version | None:
        """The version that a new round has to measure now (or a newer one); None where nothing is due.

        Due are the first version, then every `eval_every` numbers, and with `is_final` the newest one.
        """
        if not self._published or self.in_flight:
            return None
        newest, last, num_broken = self._published[-1], self._last, self._num_broken()
        if last is None or 0 < num_broken <= MAX_REPEATS:
            return newest
        measured = last.measurement.version if last.measurement else last.min_version
        if is_final:
            return newest if measured != newest and not num_broken else None
        return newest if newest.number - measured.number >= eval_every else None

    @property
    def next_number(self) -> int:
        return 0 if self._last is None else self._last.number + 1

    @property
    def in_flight(self) -> bool:
        return self._last is not None and not self._last.is_over

    def leases(self) -> list[Version]:
        """Versions that must stay on disk: the best, and while a round is under way all that it might measure."""
        needed = {self.best.version} if self.best else set()
        if self._last is not None and self.in_flight:
            needed |= {version for version in self._published if version >= self._last.min_version}
        return sorted(needed)

    def _num_broken(self) -> int:
        """Broken rounds since the newest measured one."""
        newest_first = sorted((number for number in self._rounds), reverse=True)
        return next(
            (place for place, number in enumerate(newest_first) if self._rounds[number].measurement), len(newest_first)
        )
