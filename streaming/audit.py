"""Do the books balance? Every request ends in exactly one way, per policy, when all its examples have ended.

    issued -> consumed (no ending: its checkpoint is not durable yet) -> trained | evaluated | dropped | dead_lettered
    dead_lettered -> redriven (`streamdpo redrive` took this ending back) -> one of these again

Feedback is written at least once, so the same ending may be there twice. Two DIFFERENT final endings of one example,
or training on it at two different steps, are what must never happen.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from streaming import topics
from streaming.fencing import read_fences
from streaming.history import between
from streaming.history import entries as entries
from streaming.log.protocol import Log
from streaming.records import FINAL_ENDINGS, Feedback, PromptRequest, decode

SUPERSEDED = "superseded"
"""Reason of feedback about a second content of a group that was already settled: it ends nothing."""


class Balance(NamedTuple):
    """How the requests of one policy ended."""

    policy: str
    num_requests: int
    endings: dict[tuple[str, str], int]  # (ending, reason) -> requests; of several examples the first one's
    not_ended: list[int]  # request numbers without a final ending of every example
    consumed: list[int]  # those of them that are in a step whose checkpoint is not durable yet
    ended_twice: list[int]
    unknown: list[int]  # feedback about requests that are not in the log (any more)

    @property
    def is_balanced(self) -> bool:
        """Whether every request ended exactly one way."""
        return not (self.not_ended or self.ended_twice)

    def count(self, ending: str) -> int:
        """Requests with this ending, whatever the reason."""
        return sum(count for (found, _), count in self.endings.items() if found == ending)


class _Books:
    """What feedback says about one request."""

    def __init__(self) -> None:
        self.num_examples = 1
        self.is_consumed = False
        self.endings: dict[int, Feedback] = {}  # example index -> its first final ending
        self.has_two = False

    def enter(self, one: Feedback) -> None:
        self.num_examples = max(self.num_examples, one.num_examples)
        self.is_consumed |= one.ending == "consumed"
        if one.ending == "redriven":
            self._reopen(one)
        if one.ending not in FINAL_ENDINGS:
            return
        first = self.endings.setdefault(one.index, one)
        trained_again = first.ending == "trained" and first.step != one.step
        self.has_two |= first.ending != one.ending or trained_again

    def _reopen(self, one: Feedback) -> None:
        """A dead letter's bytes were sent again: that ending, and no other, is taken back."""
        ended = self.endings.get(one.index)
        if ended is not None and ended.ending == "dead_lettered":
            del self.endings[one.index]

    @property
    def has_ended(self) -> bool:
        return len(self.endings) >= self.num_examples


def audit(requests: Iterable[PromptRequest], feedback: Iterable[Feedback], *, policy: str) -> Balance:
    """The balance of one policy. A request that was written twice (after a crash) counts once."""
    numbers = sorted({request.number for request in requests})
    books: dict[int, _Books] = {}
    for one in feedback:
        if one.ends_for(policy) and not (one.ending == "dropped" and one.reason == SUPERSEDED):
            books.setdefault(one.request_number, _Books()).enter(one)
    known = set(numbers)
    ended = [number for number in numbers if number in books and books[number].has_ended]
    not_ended = sorted(known - set(ended))
    firsts = [books[number].endings[min(books[number].endings)] for number in ended]
    return Balance(
        policy=policy,
        num_requests=len(numbers),
        endings=dict(Counter((first.ending, first.reason) for first in firsts)),
        not_ended=not_ended,
        consumed=[number for number in not_ended if number in books and books[number].is_consumed],
        ended_twice=[number for number in sorted(books) if books[number].has_two],
        unknown=sorted(set(books) - known),
    )


def audit_log(log: Log, *, policy: str) -> Balance:
    """The balance of what is in a log now. It changes nothing and may run beside a live run.

    Requests are read before feedback, so a request issued meanwhile is not called unended. What a learner wrote after a
    newer start of it had taken over counts for nothing. Raises RecordError where
    one of the two topics holds something else.
    """
    requests = [decode(PromptRequest, entry.value, where=entry.where) for entry in entries(log, topics.PROMPTS.name)]
    return audit(requests, _feedback(log), policy=policy)


def _feedback(log: Log) -> Iterator[Feedback]:
    """What `feedback` holds now and is not void. The fences are read last: of what is read, they are all known."""
    begins, ends = log.begin_offsets(topics.FEEDBACK.name), log.end_offsets(topics.FEEDBACK.name)
    fences = read_fences(log)
    for entry in between(log, begins, ends):
        one = decode(Feedback, entry.value, where=entry.where)
        if not fences.is_void(one, entry):
            yield one
