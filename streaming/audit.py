"""Do the books balance? Every request ends in exactly one way, per policy, when all its examples have ended.

    issued -> consumed (no ending: its checkpoint is not durable yet) -> trained | evaluated | dropped | dead_lettered
    dead_lettered -> redriven (`streamdpo redrive` took this ending back) -> one of these again

Feedback is written at least once, so the same ending may be there twice. Two DIFFERENT final endings of one example,
or training on it at two different steps, are what must never happen. `books` does the bookkeeping.

Of what has not ended, dead letters are named: bytes that nobody could read, and of which nobody knew whose they were.
"""

from collections.abc import Container, Iterable
from typing import NamedTuple

from streaming import topics
from streaming.books import SUPERSEDED as SUPERSEDED
from streaming.books import Ledger, read_books
from streaming.dead_letters import unsent
from streaming.history import records
from streaming.keys import group_under
from streaming.log.protocol import Log
from streaming.records import Feedback, PromptRequest

_ON_THE_WAY = (topics.CANDIDATES.name, topics.SCORED.name, topics.FEEDBACK.name)
"""Topics of which a record is of a request, and lies under its group's key; beside the policy's pairs."""


class Balance(NamedTuple):
    """How the requests of one policy ended."""

    policy: str
    num_requests: int
    endings: dict[tuple[str, str], int]  # (ending, reason) -> requests; of several examples the first one's
    not_ended: list[int]  # request numbers without a final ending of every example
    consumed: list[int]  # those of them that are in a step whose checkpoint is not durable yet
    ended_twice: list[int]
    unknown: list[int]  # feedback about requests that are not in the log (any more)
    carried_s: float | None = None  # Unix time of the carried balance that this one goes on from, past retention
    is_whole: bool = True  # False: retention has taken what no carried balance holds
    unreadable: list[str] = []  # places of bytes in the books that are no record: dead letters, of no request
    dead: list[int] = []  # those of `not_ended` of which a dead letter is there
    nameless: list[str] = []  # where dead bytes lay that name no request here: they may be of any of `not_ended`

    @property
    def is_balanced(self) -> bool:
        """Whether every request ended exactly one way."""
        return not (self.not_ended or self.ended_twice)

    def count(self, ending: str) -> int:
        """Requests with this ending, whatever the reason."""
        return sum(count for (found, _), count in self.endings.items() if found == ending)


def audit(requests: Iterable[PromptRequest], feedback: Iterable[Feedback], *, policy: str) -> Balance:
    """The balance of one policy. A request that was written twice (after a crash) counts once."""
    ledger = Ledger(policy)
    for request in requests:
        ledger.issue(request)
    for one in feedback:
        ledger.enter(one)
    return _balance(ledger)


def audit_log(log: Log, *, policy: str) -> Balance:
    """The balance of what is in a log now, and of what was carried forward before retention took it.

    It changes nothing and may run beside a live run. What a learner wrote after a newer start of it had taken over
    counts for nothing.
    """
    read = read_books(log, policy)
    found = _balance(read.ledger)._replace(carried_s=read.carried_s, is_whole=read.is_whole, unreadable=read.unreadable)
    if not found.not_ended:
        return found
    dead, nameless = _among_dead_letters(log, policy, set(found.not_ended))
    return found._replace(dead=dead, nameless=nameless)


def _among_dead_letters(log: Log, policy: str, not_ended: Container[int]) -> tuple[list[int], list[str]]:
    """Which of these requests have a dead letter, and where dead bytes lay that name none at all."""
    letters = [letter for letter in unsent(log) if letter.source.topic in (*_ON_THE_WAY, topics.pairs(policy).name)]
    issued = (request for _, request in records(log, topics.PROMPTS.name, PromptRequest)) if letters else ()
    numbers = {request.group_id: request.number for request in issued}
    dead: set[int] = set()
    nameless: list[str] = []
    for letter in letters:
        number = numbers.get(group_under(letter.key) or "")
        if number is None:
            source = letter.source
            nameless.append(f"{source.topic}/{source.partition}@{source.offset}")
        elif number in not_ended:
            dead.add(number)
    return sorted(dead), nameless


def _balance(ledger: Ledger) -> Balance:
    not_ended = [number for number in ledger.issued if not ledger.has_ended(number)]
    accounts = ledger.accounts
    return Balance(
        policy=ledger.policy,
        num_requests=len(ledger.issued),
        endings=dict(ledger.endings()),
        not_ended=not_ended,
        consumed=[number for number in not_ended if number in accounts and accounts[number].is_consumed],
        ended_twice=sorted(ledger.ended_twice),
        unknown=[number for number in sorted(accounts) if number not in ledger.issued],
    )
