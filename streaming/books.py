"""The books of a policy, carried forward: what is past retention stays in the balance.

    requests, feedback -> accounts (one per request) -> closed: counted by ending, and remembered as intervals

`Ledger` is the bookkeeping itself; `audit` reads a whole log into one. `Bookkeeper` writes a ledger as one small record
from time to time, beside a running scheduler, so that an audit can go on from it where the log has been trimmed. The
newest requests keep their accounts: a second ending of one of these is found. What is said about a closed request is
not compared any more: it is a repetition after a crash, or a dead letter that was sent again.

A request that is sampled again has other content under the same id, and a late copy of it may be dropped where nobody
remembers the first: such a drop ends nothing, whichever of the two is told first.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence

from streaming import topics
from streaming.endings import FORGOTTEN, request_in
from streaming.errors import LogError, RecordError
from streaming.fencing import read_fences, read_issuers
from streaming.frontier import IntervalSet
from streaming.history import between
from streaming.log.protocol import Entry, Log, Offsets, Output, Partition
from streaming.records import (
    FINAL_ENDINGS,
    Account,
    CarriedBalance,
    Ended,
    Feedback,
    PromptRequest,
    decode,
    encode,
)

SUPERSEDED = "superseded"
"""Reason of feedback about a second content of a group that was already settled: it ends nothing."""

KEPT_REQUESTS = 4096
"""Newest requests whose accounts are carried whole: far more than a restart repeats, and a record of some 350 KB."""

CARRY_S = 600.0
"""Between two carried balances: the shortest retention is two days, and a file of a size takes longer to fill."""


class Ledger:
    """The accounts of one policy. Feedback comes in the order of its partition; requests and feedback in any order."""

    def __init__(self, policy: str, carried: CarriedBalance | None = None) -> None:
        carried = carried or CarriedBalance(policy=policy)
        self.policy = policy
        self.issued = IntervalSet(carried.issued)
        self.closed = IntervalSet(carried.closed)
        self.ended_twice = set(carried.ended_twice)
        self.ordinals = IntervalSet(carried.ordinals or [(0, carried.next_ordinal)])
        self.counts = Counter({(ending, reason): count for ending, reason, count in carried.endings})
        self.accounts = {one.number: one for one in carried.accounts}

    def issue(self, request: PromptRequest) -> None:
        """A request was written, perhaps again."""
        self.issued.add(request.number)
        if request.ordinal is not None:
            self.ordinals.add(request.ordinal)

    def enter(self, one: Feedback) -> None:
        """Something was said about an example, perhaps again, perhaps of another policy."""
        if not one.ends_for(self.policy) or (one.ending == "dropped" and one.reason == SUPERSEDED):
            return
        number = one.request_number
        if number in self.closed:
            if one.ending != "redriven":
                return
            self._open_again(one)
        account = self.accounts.get(number, Account(number=number))
        self.accounts[number], is_contradicted = _entered(account, one)
        if is_contradicted:
            self.ended_twice.add(number)

    def has_ended(self, number: int) -> bool:
        """Whether every example of an issued request has its final ending."""
        account = self.accounts.get(number)
        return number in self.closed or (account is not None and _is_over(account))

    def has_freed(self, number: int) -> bool:
        """Whether an issued request takes no place in the pipeline any more: it ended, or its one example was taken."""
        account = self.accounts.get(number)
        is_taken = account is not None and account.is_consumed and account.num_examples == 1
        return is_taken or self.has_ended(number)

    def close(self, *, kept: int = KEPT_REQUESTS) -> None:
        """Count the ended requests beyond the newest `kept` and forget their accounts."""
        newest = max((first_and_end[1] for first_and_end in self.issued.intervals), default=0)
        for number in sorted(self.accounts):
            if number < newest - kept and number in self.issued and _is_over(self.accounts[number]):
                self.counts[_first_ending(self.accounts.pop(number))] += 1
                self.closed.add(number)

    def endings(self) -> Counter[tuple[str, str]]:
        """(ending, reason) -> ended requests; of several examples the first one's."""
        open_ = [self.accounts[number] for number in self.accounts if number in self.issued]
        return self.counts + Counter(_first_ending(account) for account in open_ if _is_over(account))

    def carried(self, places: Sequence[tuple[str, int, int]], *, time_s: float, is_whole: bool) -> CarriedBalance:
        """All of it as a record that holds what lies before `places` (topic, partition, next offset)."""
        return CarriedBalance(
            policy=self.policy,
            places=list(places),
            issued=self.issued.intervals,
            closed=self.closed.intervals,
            endings=[(ending, reason, count) for (ending, reason), count in sorted(self.counts.items())],
            accounts=[self.accounts[number] for number in sorted(self.accounts)],
            ended_twice=sorted(self.ended_twice),
            next_ordinal=max((end for _, end in self.ordinals.intervals), default=0),
            ordinals=self.ordinals.intervals,
            is_whole=is_whole,
            time_s=time_s,
        )

    def _open_again(self, one: Feedback) -> None:
        """A dead letter of a closed request was sent again: its ending is taken back out of the counts."""
        number, counted = one.request_number, ("dead_lettered", one.reason)
        if self.counts[counted] > 0:
            self.counts[counted] -= 1
            parts = [part for first, end in self.closed.intervals for part in _without(number, first, end)]
            self.closed = IntervalSet(parts)


class Read:
    """A ledger and where it stands in the log."""

    def __init__(self, ledger: Ledger, carried: CarriedBalance | None) -> None:
        self.ledger = ledger
        self.carried_s = carried.time_s if carried is not None else None
        self.is_whole = True  # nothing was ever trimmed that no carried balance holds
        self.is_open = False  # whether some requests count is about to be said: a scheduler takes over at this moment
        self.unreadable: list[str] = []  # places of bytes that are no record
        self.places: list[tuple[str, int, int]] = []


def read_books(log: Log, policy: str, *, always_carried: bool = False) -> Read:
    """The books as the log has them now.

    The whole log is read while nothing of it is trimmed (every pair of endings is compared then); from then on, or
    where `always_carried`, the newest carried balance and what came after it.
    """
    named = (topics.PROMPTS.name, topics.FEEDBACK.name)
    begins = {place: offset for topic in named for place, offset in log.begin_offsets(topic).items()}
    carried = newest_carried(log, policy) if always_carried or any(begins.values()) else None
    held = _held(carried)
    read = Read(Ledger(policy, carried), carried)
    read.is_whole = is_whole(carried, begins)
    starts = {place: max(begin, held.get(place, 0)) for place, begin in begins.items()}
    for topic in named:  # requests before feedback: one issued meanwhile is not called unended
        ends = log.end_offsets(topic)
        _read_topic(log, {place: at for place, at in starts.items() if place[0] == topic}, ends, read)
        read.places += [(topic, partition, offset) for (_, partition), offset in sorted(ends.items())]
    return read


def is_whole(carried: CarriedBalance | None, begins: Offsets) -> bool:
    """Whether a balance, or none, holds everything that the log has forgotten where it begins at `begins`."""
    held = _held(carried)
    was_whole = carried is None or carried.is_whole
    return was_whole and all(begin <= held.get(place, 0) for place, begin in begins.items())


def _held(carried: CarriedBalance | None) -> dict[Partition, int]:
    """What comes before these offsets is in the balance."""
    return {(topic, partition): offset for topic, partition, offset in carried.places} if carried else {}


def newest_carried(log: Log, policy: str) -> CarriedBalance | None:
    """The policy's newest carried balance; None where there is none, or none that can be read."""
    entry = log.newest(topics.BOOKS.name).get(policy.encode())
    try:
        return None if entry is None else decode(CarriedBalance, entry.value, where=entry.where)
    except RecordError:
        return None


def carry(log: Log, policies: Sequence[str], *, kept: int = KEPT_REQUESTS) -> None:
    """Write each policy's books as they stand now. Where two do it at once, either record is right."""
    for policy in policies:
        read = read_books(log, policy, always_carried=True)
        if read.is_open:
            continue  # the next one has it
        read.ledger.close(kept=kept)
        record = read.ledger.carried(read.places, time_s=time.time(), is_whole=read.is_whole)
        log.append([Output(topics.BOOKS.name, policy.encode(), encode(record))])


class Bookkeeper:
    """Carries the balances of a run's policies forward, in a thread of its own beside the scheduler."""

    def __init__(self, log: Log, policies: Sequence[str], *, every_s: float = CARRY_S) -> None:
        self._log = log
        self._policies = policies
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="books", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Carry once more and end."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            is_last = self._stop.wait(self._every_s)
            try:
                carry(self._log, self._policies)
            except LogError:
                # Nothing is lost by it: the balance before still holds, and the next one takes in what this one missed.
                logging.getLogger(__name__).exception("the balances were not carried forward")
            if is_last:
                return


def _read_topic(log: Log, starts: dict[Partition, int], ends: dict[Partition, int], read: Read) -> None:
    fences, issuers = read_fences(log), read_issuers(log)  # after the ends: of what is read, they are all known
    for entry in between(log, starts, ends):
        try:
            if entry.topic == topics.PROMPTS.name:
                request = request_in(entry.value, where=entry.where)
                verdict = issuers.verdict(request.claim, entry)
                read.is_open |= verdict == "open"
                if verdict != "void":
                    read.ledger.issue(request)
            elif not fences.is_void(one := _feedback(entry), entry):
                read.ledger.enter(one)
        except RecordError:  # its reader has dead-lettered it
            read.unreadable.append(entry.where)


def _feedback(entry: Entry) -> Feedback:
    return decode(Feedback, entry.value, where=entry.where)


def _entered(account: Account, one: Feedback) -> tuple[Account, bool]:
    """The account after this was said, and whether it contradicts what was said before."""
    ended, is_contradicted = account.ended, False
    if one.ending == "redriven":
        ended = [other for other in ended if (other.index, other.ending) != (one.index, "dead_lettered")]
    elif one.ending in FINAL_ENDINGS:
        ended, is_contradicted = _ended(ended, one)
    account = Account(
        number=account.number,
        num_examples=max(account.num_examples, one.num_examples),
        is_consumed=account.is_consumed or one.ending == "consumed",
        ended=ended,
    )
    return account, is_contradicted


def _ended(ended: list[Ended], one: Feedback) -> tuple[list[Ended], bool]:
    """The examples' endings with one more, and whether that is a second one of its example."""
    now = Ended(index=one.index, ending=one.ending, reason=one.reason, step=one.step, content_hash=one.content_hash)
    before = next((other for other in ended if other.index == now.index), None)
    if before is None:
        return [*ended, now], False
    if _yields(now, to=before):
        return ended, False
    if _yields(before, to=now):
        return [now if other is before else other for other in ended], False
    return ended, before.ending != now.ending or (now.ending == "trained" and before.step != now.step)


def _yields(drop: Ended, *, to: Ended) -> bool:
    """Whether a drop says nothing beside the example's other ending.

    Before the learner a drop is about one sampling, and the ending of another sampling wins; a prompt is forgotten
    after it was sampled, perhaps after the example has ended. What a learner drops it has settled.
    """
    if drop.ending != "dropped" or drop.step is not None:
        return False
    is_other_content = "" not in (drop.content_hash, to.content_hash) and drop.content_hash != to.content_hash
    return drop.reason == FORGOTTEN or is_other_content


def _is_over(account: Account) -> bool:
    return len(account.ended) >= account.num_examples


def _first_ending(account: Account) -> tuple[str, str]:
    first = min(account.ended, key=lambda ended: ended.index)
    return first.ending, first.reason


def _without(number: int, first: int, end: int) -> list[tuple[int, int]]:
    return [(first, number), (number + 1, end)] if first <= number < end else [(first, end)]
