"""A position in a Kafka log: a member of a group, or a reader of named partitions.

    join (group) -> hold partitions -> poll -> buffered by partition -> given out in turn -> committed

Partitions change hands only inside `read`: a member that is busy keeps what it holds, its heartbeats go on in
kafka-python's own thread, and the others wait with the rebalance until it reads again.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from kafka import ConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.errors import (
    CommitFailedError,
    KafkaError,
    LogTruncationError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
)
from kafka.structs import OffsetAndMetadata

from streaming.errors import LeaseLostError, LogError, TrimmedError
from streaming.log.kafka_cluster import Cluster
from streaming.log.kafka_failures import ask, explain, passes
from streaming.log.kafka_group import is_rebalancing
from streaming.log.protocol import Consumer, Entry, Offsets, Partition

_POLL_RECORDS = 512
"""Taken out of kafka-python at once: they are fetched anyway, and a poll costs as much for one as for many."""

_POLL_S = 0.2
"""Between two polls at most while everything is buffered: a poll is also how a member takes part in its group."""

_CATCH_UP_S = 0.05
"""One poll of a read whose time is up while there are still records that lie in the log since before it began."""

_PATIENCE_S = 5.0
"""How long such a read goes on: a cluster that does not deliver in this time has nothing to give now."""

_FAILED_PAUSE_S = 0.1
"""After a poll that failed at once, before the next."""

_CLOSE_S = 5.0
"""How long leaving the group may take; after that the brokers find out by the session timeout."""

_REJOIN_POLL_S = 0.1
"""One poll of a commit that waits for a rebalance."""

Deleted = Callable[[bytes, int], None]
"""Told of every tombstone (key, offset) as it is fetched: before the entries behind it in its partition are read."""


class _Revoked(ConsumerRebalanceListener):  # type: ignore[misc]
    """Notes the partitions that a rebalance took away. Called in kafka-python's thread while ours waits in a poll."""

    def __init__(self) -> None:
        self.places: set[TopicPartition] = set()

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self.places.update(revoked)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        self.places.update(lost)

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Nothing to do: they start where the group committed."""


class LogConsumer(Consumer):
    """Belongs to one thread. `group` is None for a reader of named partitions."""

    def __init__(
        self,
        client: KafkaConsumer,
        cluster: Cluster,
        *,
        group: str | None,
        timeout_s: float,
        closed: "Callable[[LogConsumer], None]",
        deleted: Deleted | None = None,
    ) -> None:
        self._client = client
        self._cluster = cluster
        self._group = group
        self._timeout_s = timeout_s
        self._closed = closed
        self._deleted = deleted
        self._revoked = _Revoked()
        self._held: set[TopicPartition] = set()
        self._buffers: dict[TopicPartition, deque[Entry]] = {}
        self._positions: dict[TopicPartition, int] = {}
        self._polled_s = 0.0
        self._ends: dict[Partition, int] = {}  # when they were last asked for
        self._is_closed = False

    def subscribe(self, topics: Iterable[str]) -> None:
        """Ask for a share of these topics; it comes inside `read`."""
        self._client.subscribe([self._cluster.topic(topic) for topic in topics], listener=self._revoked)

    def assign(self, offsets: Offsets) -> None:
        """Hold exactly these partitions."""
        self._client.assign([self._cluster.place(partition) for partition in offsets])
        self._follow_assignment()
        self.seek(offsets)

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        now_s = time.monotonic()
        deadline_s = now_s + timeout_s
        if self._num_buffered() < max_records:
            self._poll(0)
        elif now_s > self._polled_s + _POLL_S:
            self._poll(0, max_records=1)  # no more than is given out: the buffers stay as they are
        entries = self._take(max_records)
        while not entries and (left_s := deadline_s - time.monotonic()) > 0:
            self._poll(left_s)
            entries = self._take(max_records)
        return entries or self._catch_up(max_records)

    def commit(self, offsets: Offsets) -> None:
        if self._group is None:
            raise LogError("a reader without a group has nothing to commit", where="commit", do="Use subscribe().")
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            wanted = self._wanted(offsets)
            try:
                return self._commit(wanted)
            except (CommitFailedError, RebalanceInProgressError) as cause:
                # This member's last read ended before the rebalance did: its outcome says what may be committed.
                if not _is_rebalance(cause) or time.monotonic() > deadline_s:
                    raise self._lost(offsets) from cause
            self._poll(_REJOIN_POLL_S)

    def seek(self, offsets: Offsets) -> None:
        for partition, offset in offsets.items():
            place = self._cluster.place(partition)
            if place not in self._held:
                raise LogError(
                    "this reader does not hold the partition", where=_name(partition), do="Seek what it holds."
                )
            self._client.seek(place, offset)
            self._positions[place] = offset
            self._buffers.pop(place, None)

    def positions(self) -> dict[Partition, int]:
        unknown = {place for place in self._held if self._client._subscription.assignment[place].position is None}
        topics = sorted({self._cluster.partition(place)[0] for place in unknown})
        committed = self._cluster.committed(self._group, topics) if self._group is not None and topics else {}
        partitions = {self._cluster.partition(place): place for place in self._held}
        return {
            partition: committed[partition] if place in unknown else self._position(place)
            for partition, place in partitions.items()
        }

    def behind(self) -> dict[Partition, int]:
        positions = self.positions()
        ends = self._cluster.end_offsets_now(list(self._held)) if positions else {}
        if ends is not None:
            self._ends = {self._cluster.partition(place): end for place, end in ends.items()}
        return {place: max(0, self._ends.get(place, position) - position) for place, position in positions.items()}

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._closed(self)
        try:
            if self._group is not None and self._is_rebalancing():
                # The broker reads nothing more from this connection until the others have joined.
                self._cluster.leave(self._group, self._client.group_metadata().member_id)
            self._client.close(autocommit=False, timeout_ms=round(_CLOSE_S * 1000))
        except KafkaError as error:
            if not passes(error):  # a cluster that is away finds out by itself that this member is gone
                raise explain(error, where=self._where()) from error

    def _poll(self, timeout_s: float, *, max_records: int = _POLL_RECORDS) -> None:
        """Fetch into the buffers; join, leave and follow the group where it is time."""
        self._polled_s = time.monotonic()
        found: dict[TopicPartition, list[Any]] = {}
        try:
            found = self._client.poll(timeout_ms=round(timeout_s * 1000), max_records=max_records)
        except NoOffsetForPartitionError as error:
            self._follow_assignment()
            self._start(error.args[0])
        except KafkaError as error:
            self._follow_assignment()
            if isinstance(error, OffsetOutOfRangeError | LogTruncationError):
                self._check_range(error)
            elif not passes(error):
                raise explain(error, where=self._where()) from error
            time.sleep(min(timeout_s, _FAILED_PAUSE_S))
        self._follow_assignment()
        for place, records in found.items():
            if place in self._held:
                self._buffers.setdefault(place, deque()).extend(self._entries(place, records))

    def _entries(self, place: TopicPartition, records: Iterable[Any]) -> list[Entry]:
        topic, number = self._cluster.partition(place)
        entries = []
        for record in records:
            key = record.key or b""
            if record.value is not None:
                entries.append(Entry(topic, number, record.offset, key, record.value, record.timestamp / 1000))
            elif self._deleted is not None:  # a tombstone: the record of this key is deleted
                self._deleted(key, record.offset)
        return entries

    def _follow_assignment(self) -> None:
        """Forget what was taken away, even if it came back: it may have been another's in between."""
        held = self._client.assignment()
        gone = self._revoked.places | (self._held - held)
        self._revoked.places.clear()
        for place in gone:
            self._buffers.pop(place, None)
            self._positions.pop(place, None)
        self._held = held

    def _start(self, places: Iterable[TopicPartition]) -> None:
        """A partition that the group never committed starts at its beginning: what is trimmed now never was its own."""
        wanted = [place for place in places if place in self._held]
        self.seek(self._cluster.begin_offsets(wanted))

    def _check_range(self, error: KafkaError) -> None:
        """A position outside the log: behind its beginning it was trimmed, beyond its end it is not of this log."""
        begins, ends = self._cluster.begin_offsets(list(self._held)), self._cluster.end_offsets(list(self._held))
        for place in self._held:
            partition = self._cluster.partition(place)
            position = self._position(place)
            if position < begins[partition]:
                raise TrimmedError(
                    f"offsets {position} to {begins[partition] - 1} have passed retention",
                    where=f"{_name(partition)}@{position}",
                    do="These records are gone. Raise the topic's retention; seek to the beginning to go on.",
                ) from error
            if position > ends[partition]:
                raise LogError(
                    f"offset {position} is beyond the end, {ends[partition]}",
                    where=_name(partition),
                    do="This is not the log that the offset was taken from, or brokers lost records that they had "
                    "acknowledged (unclean leader election): use the run's own cluster.",
                ) from error

    def _take(self, max_records: int) -> list[Entry]:
        """Buffered entries, from another partition first each time, so that none waits for ever.

        None while others are being waited for: the partition may be another's before the entry is committed.
        """
        entries: list[Entry] = []
        if self._is_rebalancing():
            return entries
        for place in list(self._buffers):
            buffer = self._buffers.pop(place)
            while buffer and len(entries) < max_records:
                entries.append(buffer.popleft())
                self._positions[place] = entries[-1].offset + 1
            if buffer:
                self._buffers[place] = buffer  # at the back of the queue
            if len(entries) == max_records:
                break
        return entries

    def _catch_up(self, max_records: int) -> list[Entry]:
        """What lies in the log since before this read came to its end: an empty read means that there was nothing."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s and self._held and not self._is_rebalancing():
            ends = self._cluster.end_offsets_now(list(self._held))
            if ends is None or all(self._fetched(place) == end for place, end in ends.items()):
                return []
            self._poll(_CATCH_UP_S)
            if entries := self._take(max_records):
                return entries
        return []

    def _is_rebalancing(self) -> bool:
        """Others are being waited for: nothing is fetched until they have joined."""
        return self._group is not None and is_rebalancing(self._client)

    def _position(self, place: TopicPartition) -> int:
        """The next offset to give out."""
        if buffer := self._buffers.get(place):
            return min(buffer[0].offset, self._positions.get(place, buffer[0].offset))
        return max(self._positions.get(place, 0), self._fetched(place))

    def _fetched(self, place: TopicPartition) -> int:
        """The next offset to fetch: beyond what is buffered, and beyond what compaction left out."""
        state = self._client._subscription.assignment[place]
        return state.position.offset if state.position is not None else 0

    def _num_buffered(self) -> int:
        return sum(map(len, self._buffers.values()))

    def _wanted(self, offsets: Offsets) -> dict[TopicPartition, OffsetAndMetadata]:
        wanted = {self._cluster.place(partition): offset for partition, offset in offsets.items()}
        if not self._held.issuperset(wanted):
            raise self._lost(offsets)
        return {place: OffsetAndMetadata(offset, "", -1) for place, offset in wanted.items()}

    def _commit(self, wanted: dict[TopicPartition, OffsetAndMetadata]) -> None:
        """Through an outage too: asking twice for the same offsets changes nothing."""
        ask(
            lambda: self._client.commit(wanted, timeout_ms=round(self._timeout_s * 1000)),
            where=self._where(),
            timeout_s=self._timeout_s,
            handing_on=(CommitFailedError, RebalanceInProgressError),
        )

    def _lost(self, offsets: Offsets) -> LeaseLostError:
        return LeaseLostError(
            "this member does not hold the partition",
            where=f"group {self._group}, {', '.join(map(_name, offsets))}",
            do="Nothing was committed. Read on: the holder does the work again.",
        )

    def _where(self) -> str:
        topics = sorted({self._cluster.partition(place)[0] for place in self._held})
        reader = "reader" if self._group is None else f"group {self._group}"
        return f"{self._cluster.servers}: {reader} of {', '.join(topics) or 'no partition yet'}"


def _is_rebalance(error: KafkaError) -> bool:
    reason = error.args[0] if isinstance(error, CommitFailedError) and error.args else error
    return isinstance(reason, RebalanceInProgressError)


def _name(partition: Partition) -> str:
    return f"{partition[0]}/{partition[1]}"
