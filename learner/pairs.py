"""Reads pairs: no pair twice, none too stale, always in the same order.

    log -> lane (one per partition, in order) -> pending (judged, waiting for a full batch) -> batch (settled)
                                              -> dropped, or a dead letter (settled)

The order is a merge of the partitions by request number, and does not depend on how reads happen to be cut: before a
pair is taken, every partition that has anything has shown its next one. So a learner that is killed and resumed over
the same log trains the same batches. Offsets to resume from are those behind the newest batch: what was read beyond
it is read again.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from learner.settled import Claims, Settled, SettledState, Verdict
from learner.unreadable import UNREADABLE, known_of
from streaming import topics
from streaming.dead_letters import DeadLetters
from streaming.errors import RecordError
from streaming.log.protocol import Entry, Log, Output, Partition
from streaming.metrics import Metrics
from streaming.records import Feedback, Pair, decode
from streaming.stage import dead_letter

STAGE = "learner"

_CHUNK = 64
"""Entries read at once per partition: what a lane holds at most, in memory."""

_READ_S = 1.0
"""Only what is durable already is asked for, so a read that waits longer only waits again."""

Judge = Callable[[Pair], str | None]
"""Why a pair may not be trained (stale, too_long, ...), or None."""


class ReaderState(msgspec.Struct, frozen=True):
    """What a checkpoint holds of the reader."""

    offsets: list[tuple[str, int, int]]  # topic, partition, next offset
    settled: SettledState = SettledState()


class Drop(msgspec.Struct, frozen=True):
    """A pair that is settled without a gradient, and why."""

    pair: Pair
    reason: str
    letter: Output | None = None  # of one that nobody can read: to be written after its feedback


class _Next(NamedTuple):
    """The head of a lane. With a letter, nobody can read it, and the pair says which example it is."""

    offset: int
    pair: Pair
    letter: Output | None = None


class PairReader:
    """One policy's pairs, from the log to batches."""

    def __init__(self, log: Log, metrics: Metrics, *, policy: str, judge: Judge, state: ReaderState | None = None):
        self._log = log
        self._metrics = metrics
        self._judge = judge
        self._topic = topics.pairs(policy).name
        self._settled = Settled(state.settled if state else None)
        self._dead = DeadLetters(log, stage=STAGE, policy=policy)
        self._buried: dict[int, int] = {}  # requests, by this reader, and how much was told of each then
        self._held = Claims()
        self._pending: list[Pair] = []
        self._drops: list[Drop] = []
        offsets = log.begin_offsets(self._topic)
        offsets |= {(topic, partition): offset for topic, partition, offset in (state.offsets if state else [])}
        self._lanes = [_Lane(log, metrics, policy, partition, offset) for partition, offset in sorted(offsets.items())]
        self._resume = self._positions()

    @property
    def pending_requests(self) -> int:
        """Requests that have an example waiting for a batch."""
        return len({pair.request_number for pair in self._pending})

    def fill(self, num_examples: int) -> bool:
        """Read until `num_examples` are pending; False where the log has no more now."""
        ends = self._log.end_offsets(self._topic)
        while len(self._pending) < num_examples:
            for lane in self._lanes:
                lane.refill(ends[lane.partition])
            waiting = [lane for lane in self._lanes if lane.queue]
            if not waiting:
                break
            self._take(*min(waiting, key=_Lane.turn).pop())
        behind = sum(ends[lane.partition] - lane.position for lane in self._lanes)
        self._metrics.set("lag_records", behind, topic=self._topic)
        return len(self._pending) >= num_examples

    def next_batch(self, num_examples: int) -> list[Pair]:
        """Take what is pending, at most `num_examples`: settled from now on, whatever becomes of the batch."""
        batch, self._pending = self._pending[:num_examples], self._pending[num_examples:]
        for pair in batch:
            self._settled.settle(pair)
        self._held = Claims()
        for pair in self._pending:
            self._held.add(pair)
        if not self._pending:
            self._resume = self._positions()
        return batch

    def take_drops(self) -> list[Drop]:
        """Pairs dropped since the last call. They are settled."""
        drops, self._drops = self._drops, []
        return drops

    def was_told(self, one: Feedback) -> bool:
        """Whether this ending of a dead letter is known already: told again, it would undo a redrive."""
        same = msgspec.structs.replace(one, told_by=None)
        return one.ending == "dead_lettered" and any(
            msgspec.structs.replace(other, told_by=None) == same for other in self._dead.told(one.group_id)
        )

    def state(self) -> ReaderState:
        """Everything a later reader needs to go on behind the newest batch."""
        if not self._pending:
            self._resume = self._positions()
        offsets = [(topic, partition, offset) for (topic, partition), offset in sorted(self._resume.items())]
        return ReaderState(offsets, self._settled.state())

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()

    def _positions(self) -> dict[Partition, int]:
        return {lane.partition: lane.position for lane in self._lanes}

    def _take(self, pair: Pair, letter: Output | None) -> None:
        verdict = self._verdict(pair)
        if letter is not None:
            return self._give_up(pair, letter, verdict)
        if verdict != "new":
            self._metrics.count("duplicates_total" if verdict == "duplicate" else "superseded_total", topic=self._topic)
            return
        reason = self._judge(pair)
        if reason is not None:
            self._settled.settle(pair)
            self._drops.append(Drop(pair, reason))
            return
        self._held.add(pair)
        self._pending.append(pair)

    def _verdict(self, pair: Pair) -> Verdict:
        verdict = self._settled.judge(pair)
        if verdict == "dead":
            if not self._is_redriven(pair):
                return "duplicate"
            self._settled.revive(pair)
            verdict = "new"
        return self._held.judge(pair) if verdict == "new" else verdict

    def _is_redriven(self, pair: Pair) -> bool:
        """Whether a dead example is to be done again. Its ending is told after the next checkpoint only."""
        told = self._dead.told(pair.group_id)
        known = self._buried.get(pair.request_number)
        if known is None:  # by an earlier start, which has told it: what was told is past retention, if anything
            return not told or told[-1].ending == "redriven"
        return len(told) > known and told[-1].ending == "redriven"

    def _give_up(self, pair: Pair, letter: Output, verdict: Verdict) -> None:
        """A dead letter; it ends its example, unless that is a copy of one that is taken already."""
        self._metrics.count("dead_letters_total", stage=STAGE)
        if verdict != "new":
            self._log.append([letter])
            return
        self._settled.bury(pair)
        self._buried[pair.request_number] = len(self._dead.told(pair.group_id))
        self._drops.append(Drop(pair, UNREADABLE, letter))


class _Lane:
    """One partition, read a little ahead. `position` is the offset behind the last pair taken."""

    def __init__(self, log: Log, metrics: Metrics, policy: str, partition: Partition, offset: int) -> None:
        self.partition = partition
        self.position = offset
        self.queue: deque[_Next] = deque()
        self._log = log
        self._metrics = metrics
        self._policy = policy
        self._read_to = offset
        self._consumer = log.assign({partition: offset})

    def refill(self, end: int) -> None:
        """Have the next pair at hand, unless there is none before `end`."""
        while not self.queue and self._read_to < end:
            entries = self._consumer.read(max_records=_CHUNK, timeout_s=_READ_S)
            self._metrics.count("records_read_total", len(entries), topic=self.partition[0])
            for entry in entries:
                self._read_to = entry.offset + 1
                self._enqueue(entry)

    def turn(self) -> tuple[int, int, int]:
        """Lanes take turns by their next pair's request; what was selected together is trained together."""
        pair = self.queue[0].pair
        return (pair.request_number, pair.index, self.partition[1])

    def pop(self) -> tuple[Pair, Output | None]:
        """The next pair, and its letter where nobody can read it."""
        offset, pair, letter = self.queue.popleft()
        self.position = offset + 1
        return pair, letter

    def close(self) -> None:
        self._consumer.close()

    def _enqueue(self, entry: Entry) -> None:
        try:
            self.queue.append(_Next(entry.offset, decode(Pair, entry.value, where=entry.where)))
        except RecordError as error:
            letter, known = dead_letter(entry, error.what, STAGE), known_of(self._log, entry, policy=self._policy)
            if known is not None:
                self.queue.append(_Next(entry.offset, known, letter))
                return
            self._log.append([letter])
            self._metrics.count("dead_letters_total", stage=STAGE)


def is_last_batch(numbers: dict[str, float], pending_requests: int) -> bool:
    """Whether the scheduler's numbers say that what is pending is all there will ever be."""
    return bool(numbers.get("exhausted")) and 0 < pending_requests >= numbers.get("outstanding", 0)


def is_end_of_data(numbers: dict[str, float]) -> bool:
    """Whether the scheduler's numbers say that every example that there will ever be has been in a step, or dropped.

    Pairs may still be pending then: those that a crash took back out of a step. They are trained on first.
    """
    return bool(numbers.get("exhausted")) and not numbers.get("outstanding", 1)
