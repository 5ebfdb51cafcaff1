"""Read, process, write, commit: everything about a stage except what it does.

    read -> processed (a pure function) -> appended (durable) -> committed

A crash before the commit repeats the batch: the same records appear again under the same ids, and readers keep the
first. Bytes that are no record, and entries whose outputs are larger than the log takes, go to the dead-letter topic
with a reason, and the rest of the batch goes on. Any other failure ends the stage.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple

from streaming import topics
from streaming.copies import Copies, Identify
from streaming.dead_letters import DeadLetters
from streaming.errors import LeaseLostError, RecordError, TooLargeError
from streaming.fencing import AWAY_S
from streaming.log.protocol import Consumer, Entry, Log, Offsets, Output, Partition
from streaming.metrics import Metrics
from streaming.records import DeadLetter, Feedback, Source, encode

Process = Callable[[Entry], Sequence[Output]]
"""What an entry becomes. Raises RecordError where its bytes are no record."""

Reason = Literal["record", "failed", "too_large"]
"""Why an entry is a dead letter: no record, its work failed, or its outputs are larger than the log takes."""

Explain = Callable[[Entry, Reason], Feedback | None]
"""The ending of a dead letter's request, where the bytes still say which one it was."""

_IDLE_S = 0.2
"""How long a stage waits for entries: long enough to cost nothing, short enough to stop at once."""

_LAG_S = 1.0
"""Between two looks at the lag, which cost a few seeks."""

_MAX_REASON_CHARS = 4096
"""Of an error's text that a dead letter keeps: the envelope stays small beside the record."""


class _Result(NamedTuple):
    """What became of an entry."""

    entry: Entry
    outputs: list[Output]
    id: str | None = None
    buried: str | None = None  # the group of a dead letter whose end is told


def dead_letter(entry: Entry, reason: str, stage: str) -> Output:
    """The entry's untouched bytes and why they could not be processed."""
    letter = DeadLetter(
        stage=stage,
        source=Source(topic=entry.topic, partition=entry.partition, offset=entry.offset),
        key=entry.key,
        value=entry.value,
        reason=reason[:_MAX_REASON_CHARS],
        attempts=1,
        time_s=time.time(),
    )
    return Output(topics.DEAD_LETTER.name, entry.key, encode(letter))


def append(log: Log, outputs: Iterable[Output], *, between: Callable[[], None] = lambda: None) -> None:
    """Make all outputs durable, the dead letters first: whoever reads their entries again finds that they died.

    `between` is called behind the letters. A cluster takes a part of an append where its writer dies.
    """
    letters: list[Output] = []
    others: list[Output] = []
    for output in outputs:
        (letters if output.topic == topics.DEAD_LETTER.name else others).append(output)
    if letters:
        log.append(letters)
        between()
    if others:
        log.append(others)


class Stage:
    """One member of a group that turns entries into outputs. Several processes may run the same stage."""

    def __init__(
        self,
        log: Log,
        metrics: Metrics,
        process: Process,
        *,
        name: str,
        group: str,
        topics: Sequence[str],
        identify: Identify,
        explain: Explain,
        outputs: Sequence[str] = (),
        policy: str | None = None,
        max_records: int = 64,
        away_s: float = AWAY_S,
    ) -> None:
        """`name` stands in dead letters and metrics; `group` is the consumer group of `topics`.

        `policy`: whose endings `explain` tells, where each policy has a stage of its own. `outputs`: topics of what
        is written, where their keys name groups.

        What took `away_s` or longer (the process may have stood still) is appended only where it is still ours to do.
        """
        self._log = log
        self._metrics = metrics
        self._process = process
        self._name = name
        self._group = group
        self._topics = topics
        self._copies = Copies(log, identify, DeadLetters(log, stage=name, policy=policy), outputs=outputs)
        self._explain = explain
        self._max_records = max_records
        self._away_s = away_s
        self._lag_told_s = 0.0

    def run(self, stop: threading.Event) -> None:
        """Work until `stop`. Raises what is no entry's fault: a broken log, a bug."""
        with self._log.subscribe(self._group, self._topics) as consumer:
            while not stop.is_set():
                self.run_once(consumer, timeout_s=_IDLE_S)

    def run_once(self, consumer: Consumer, *, timeout_s: float) -> int:
        """One batch; returns how many entries were consumed."""
        self._metrics.time.enter("waiting")
        asked_s = time.monotonic()
        entries = consumer.read(max_records=self._max_records, timeout_s=timeout_s)
        self._metrics.time.enter("busy")
        try:
            self._consume(entries, consumer, asked_s=asked_s)
        finally:
            self._metrics.time.enter("waiting")
        self._tell_lag(consumer)
        return len(entries)

    def _consume(self, entries: list[Entry], consumer: Consumer, *, asked_s: float) -> None:
        """`asked_s`: when the log was asked for them. Since then this process may have stood still."""
        if not entries:
            return
        self._count("records_read_total", [entry.topic for entry in entries])
        self._copies.catch_up(entries, consumer)
        ids: set[str] = set()
        results = []
        for entry in entries:
            result = self._work(entry, ids)
            ids |= {one for one in (result.id, result.buried) if one is not None}
            results.append(result)
        if time.monotonic() - asked_s >= self._away_s:
            results = self._still_ours(results, consumer)
        done = self._append(results)
        self._remember(done)
        self._commit({_place(result.entry): result.entry.offset + 1 for result in done}, consumer)

    def _still_ours(self, results: list[_Result], consumer: Consumer) -> list[_Result]:
        """Those of the partitions that no other member has taken over.

        It commits where each begins, which is where its group is. What is given up, the new holder does.
        """
        begins: dict[Partition, int] = {}
        for result in results:
            begins.setdefault(_place(result.entry), result.entry.offset)
        ours = {place for place, offset in begins.items() if self._commit({place: offset}, consumer)}
        return [result for result in results if _place(result.entry) in ours]

    def _commit(self, offsets: Offsets, consumer: Consumer) -> bool:
        """False where a partition was lost: its new holder does its part of the batch again, and readers keep the
        first copy."""
        try:
            consumer.commit(offsets)
        except LeaseLostError:
            self._metrics.count("retries_total", stage=self._name)
            return False
        return True

    def _work(self, entry: Entry, batch_ids: Collection[str]) -> _Result:
        """Process one entry, unless it is a copy; give it up where it is no record."""
        try:
            found = self._copies.identify(entry)
            if self._is_copy(found, entry, batch_ids):
                self._metrics.count("duplicates_total", topic=entry.topic)
                return _Result(entry, [])
            return _Result(entry, list(self._process(entry)), found)
        except RecordError as error:
            return self._give_up(entry, "record", error, batch_ids)

    def _is_copy(self, one: str, entry: Entry, batch_ids: Collection[str]) -> bool:
        return one in batch_ids or self._copies.is_copy(one, entry)

    def _give_up(self, entry: Entry, reason: Reason, error: Exception, batch_ids: Collection[str] = ()) -> _Result:
        """A dead letter, and the end of its request where it is known; unless it is a copy that nobody can read."""
        self._metrics.count("dead_letters_total", stage=self._name)
        outputs = [dead_letter(entry, f"{type(error).__name__}: {error}", self._name)]
        feedback = self._explain(entry, reason)
        if feedback is None or self._is_copy(feedback.group_id, entry, batch_ids):
            return _Result(entry, outputs)
        self._metrics.count("endings_total", ending=feedback.ending, reason=reason)
        outputs.append(Output(topics.FEEDBACK.name, feedback.group_id.encode(), encode(feedback)))
        return _Result(entry, outputs, buried=feedback.group_id)

    def _append(self, results: list[_Result]) -> list[_Result]:
        """Make all outputs durable. Where one is too large its entry is a dead letter, and the others go on.

        Returns what was written.
        """
        try:
            self._write([output for result in results for output in result.outputs])
        except TooLargeError as error:
            if len(results) > 1:
                return [written for result in results for written in self._append([result])]
            results = [self._give_up(results[0].entry, "too_large", error)]
            self._write(results[0].outputs)
        return results

    def _write(self, outputs: list[Output]) -> None:
        append(self._log, outputs)
        self._count("records_written_total", [output.topic for output in outputs])

    def _remember(self, done: list[_Result]) -> None:
        for result in done:
            if result.id is not None:
                self._copies.add([result.id])
            if result.buried is not None:
                self._copies.bury(result.buried)
            self._copies.passed(result.entry)

    def _count(self, name: str, counted: list[str]) -> None:
        for topic in set(counted):
            self._metrics.count(name, counted.count(topic), topic=topic)

    def _tell_lag(self, consumer: Consumer) -> None:
        if time.monotonic() - self._lag_told_s < _LAG_S:
            return
        self._lag_told_s = time.monotonic()
        behind = consumer.behind()
        for topic in self._topics:
            lag = sum(num for place, num in behind.items() if place[0] == topic)
            self._metrics.set("lag_records", lag, topic=topic)


def _place(entry: Entry) -> Partition:
    return entry.topic, entry.partition
