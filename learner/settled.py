"""Which examples are settled, for ever: no pair is trained twice, wherever in the log it appears again.

    new -> held (read, waiting for a batch) -> partly settled (its request has other examples) -> request settled
    new -> dead (nobody can read it) -> (sent again by `streamdpo redrive`) new

A request is settled for one content under one selection: the first that was taken wins, and examples of another
sampling or of other settings are superseded. Settled requests are a set of numbers, kept as intervals; only requests
whose examples are not all settled yet, or died, are kept with their contents.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

from streaming.frontier import IntervalSet
from streaming.records import Pair

Verdict = Literal["new", "duplicate", "superseded", "dead"]


class Claim(msgspec.Struct, frozen=True):
    """The content and the settings that won a request, and which of its examples are taken."""

    request_number: int
    content_hash: str
    settings_hash: str
    num_examples: int
    indices: list[int]
    dead: list[int] = []  # those of them that are dead letters


class SettledState(msgspec.Struct, frozen=True):
    """What a checkpoint holds."""

    intervals: list[tuple[int, int]] = []  # [first, end) of request numbers
    claims: list[Claim] = []  # requests that are settled in part


class Claims:
    """Requests of which some examples are taken."""

    def __init__(self, claims: Iterable[Claim] = ()) -> None:
        self._claims = {claim.request_number: claim for claim in claims}

    def judge(self, pair: Pair) -> Verdict:
        claim = self._claims.get(pair.request_number)
        if claim is None:
            return "new"
        if pair.index in claim.dead:
            return "dead"
        if (claim.content_hash, claim.settings_hash) != (pair.content_hash, pair.settings_hash):
            return "superseded"
        return "duplicate" if pair.index in claim.indices else "new"

    def add(self, pair: Pair) -> Claim:
        """Take an example that is new, and return what is taken of its request now."""
        before = self._claims.get(pair.request_number)
        taken = [*(before.indices if before else []), pair.index]
        dead = before.dead if before else []
        claim = Claim(pair.request_number, pair.content_hash, pair.settings_hash, pair.num_examples, taken, dead)
        self._claims[pair.request_number] = claim
        return claim

    def bury(self, pair: Pair) -> None:
        """Take an example that nobody can read."""
        claim = self.add(pair)
        self._claims[pair.request_number] = msgspec.structs.replace(claim, dead=[*claim.dead, pair.index])

    def revive(self, pair: Pair) -> None:
        """A dead example is not taken any more."""
        claim = self._claims.pop(pair.request_number)
        indices, dead = ([index for index in some if index != pair.index] for some in (claim.indices, claim.dead))
        if indices:
            self._claims[pair.request_number] = msgspec.structs.replace(claim, indices=indices, dead=dead)

    def forget(self, request_number: int) -> None:
        del self._claims[request_number]

    def all(self) -> list[Claim]:
        return list(self._claims.values())


class Settled:
    """The settled examples of one policy."""

    def __init__(self, state: SettledState | None = None) -> None:
        state = state or SettledState()
        self._requests = IntervalSet(state.intervals)
        self._claims = Claims(state.claims)

    def judge(self, pair: Pair) -> Verdict:
        """Whether this example may still be taken. Of a settled request nothing may: its contents are forgotten."""
        return "duplicate" if pair.request_number in self._requests else self._claims.judge(pair)

    def settle(self, pair: Pair) -> None:
        """This example is trained, or dropped for good."""
        claim = self._claims.add(pair)
        if len(claim.indices) >= claim.num_examples and not claim.dead:
            self._claims.forget(pair.request_number)
            self._requests.add(pair.request_number)

    def bury(self, pair: Pair) -> None:
        """This example is a dead letter: it stays known as one, for it may be sent again."""
        self._claims.bury(pair)

    def revive(self, pair: Pair) -> None:
        """A dead example was sent again: it is new."""
        self._claims.revive(pair)

    def state(self) -> SettledState:
        """All of it, to build it again."""
        return SettledState(list(self._requests.intervals), self._claims.all())
