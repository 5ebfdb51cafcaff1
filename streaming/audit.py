"""Do the books balance? Every request ends in exactly one way, per policy, when all its examples have ended.

    issued -> consumed (no ending: its checkpoint is not durable yet) -> trained | evaluated | dropped | dead_lettered
    dead_lettered -> redriven (`streamdpo redrive` took this ending back) -> one of these again

Feedback is written at least once, so the same ending may be there twice. Two DIFFERENT final endings of one example,
or training on it at two different steps, are what must never happen. `books` does the bookkeeping.
"""

from collections.abc import Iterable
from typing import NamedTuple

from streaming.books import SUPERSEDED as SUPERSEDED
from streaming.books import Ledger, read_books
from streaming.log.protocol import Log
from streaming.records import Feedback, PromptRequest


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
    return _balance(read.ledger)._replace(carried_s=read.carried_s, is_whole=read.is_whole, unreadable=read.unreadable)


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
