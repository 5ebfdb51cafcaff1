"""When held-out measurements are due, and which weight versions they still need. Values in, values out.

    due -> issued (every held-out prompt once, in one append) -> each request ended -> over: measured, or broken

A round is broken where a version change, a missing reward or a dead letter kept it from being one version's
measurement; it is repeated at once, a few times.
"""

from dataclasses import dataclass, field

from streaming.records import Feedback, PromptRequest, Version

MAX_REPEATS = 3
"""Broken rounds in a row before the next one waits for its turn: a reward that is always missing stays missing."""


@dataclass
class Round:
    """One measurement under way or over."""

    number: int
    min_version: Version
    size: int
    issued: set[int] = field(default_factory=set)  # request numbers
    ended: set[int] = field(default_factory=set)
    evaluated: list[Feedback] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return len(self.ended) >= len(self.issued)  # fewer than `size` where an append was torn: then it is broken

    @property
    def version(self) -> Version | None:
        """The single version that was measured, once the round is over and whole."""
        versions = {f.version for f in self.evaluated if f.mean_reward is not None}
        whole = len(self.evaluated) == self.size and len(versions) == 1 and None not in versions
        return versions.pop() if whole else None

    @property
    def mean_reward(self) -> float | None:
        """Mean reward over the round's prompts; None while it is not one version's whole measurement."""
        if self.version is None:
            return None
        return sum(f.mean_reward or 0.0 for f in self.evaluated) / self.size


class Rounds:
    """All rounds of a run. Rebuilt after a crash by the same calls in the order of the log."""

    def __init__(self) -> None:
        self._rounds: dict[int, Round] = {}
        self._round_of: dict[int, int] = {}  # request number -> round number
        self._published: list[Version] = []  # the newest one, and what came while a round was under way

    def publish(self, version: Version) -> None:
        """A weight version exists."""
        if not self.in_flight:
            self._published.clear()
        self._published.append(version)

    def issue(self, request: PromptRequest) -> None:
        """A request of a round is durable in the log."""
        assert request.round is not None and request.round_size is not None and request.min_version is not None
        new = Round(request.round, request.min_version, request.round_size)
        self._rounds.setdefault(request.round, new).issued.add(request.number)
        self._round_of[request.number] = request.round

    def end(self, feedback: Feedback) -> Round | None:
        """An evaluation request ended. Returns its round where that was the last one of it."""
        number = self._round_of.get(feedback.request_number)
        if number is None:
            return None
        found = self._rounds[number]
        if found.is_over or feedback.request_number in found.ended:
            return None
        found.ended.add(feedback.request_number)
        if feedback.ending == "evaluated":
            found.evaluated.append(feedback)
        return found if found.is_over else None

    def due(self, *, eval_every: int, is_final: bool) -> Version | None:
        """The version that a new round has to measure now (at least); None where nothing is due.

        Due are the first version, then every `eval_every` numbers, and with `is_final` the newest one.
        """
        if not self._published or self.in_flight:
            return None
        newest, last = self._published[-1], self.last
        if last is None:
            return newest
        if last.version is None and self._broken_in_a_row() <= MAX_REPEATS:
            return newest
        measured = last.version or last.min_version
        if is_final:
            return newest if last.version != newest and self._broken_in_a_row() <= MAX_REPEATS else None
        # A restarted learner may go on from a lower number: the growth counts from there.
        base = measured.number if newest.epoch == measured.epoch else min(measured.number, newest.number)
        return newest if newest.number - base >= eval_every else None

    @property
    def next_number(self) -> int:
        return max(self._rounds, default=-1) + 1

    @property
    def last(self) -> Round | None:
        return self._rounds[max(self._rounds)] if self._rounds else None

    @property
    def in_flight(self) -> bool:
        return self.last is not None and not self.last.is_over

    @property
    def newest_measured(self) -> Round | None:
        return next((self._rounds[n] for n in sorted(self._rounds, reverse=True) if self._rounds[n].version), None)

    @property
    def best(self) -> Round | None:
        """The measured round with the highest mean reward; the earliest of equals."""
        measured = [r for _, r in sorted(self._rounds.items()) if r.mean_reward is not None]
        return max(measured, key=lambda r: r.mean_reward or 0.0, default=None)

    def leases(self) -> list[Version]:
        """Versions that must stay on disk: the best, and while a round is under way all that it might measure."""
        needed = {self.best.version} if self.best else set()
        if self.last is not None and self.in_flight:
            needed |= {v for v in self._published if v >= self.last.min_version}
        return sorted(v for v in needed if v is not None)

    def _broken_in_a_row(self) -> int:
        count = 0
        for number in sorted(self._rounds, reverse=True):
            if self._rounds[number].version is not None:
                break
            count += 1
        return count
