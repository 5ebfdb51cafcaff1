"""The embedded log: one file, one machine, several processes. `protocol.py` says what it promises.

    append: queued -> one transaction with whatever else is queued -> on the disk -> acknowledged, readers woken

`store` holds the file and the writer, `partitions` the statements, `leases` the groups, `consumer` the reading.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from weakref import WeakSet

from streaming import topics as table
from streaming.errors import LogError
from streaming.log import partitions
from streaming.log.consumer import SQLiteConsumer
from streaming.log.leases import Membership, renew_all
from streaming.log.partitions import OFFSET_BITS, Layout, Placed
from streaming.log.placing import partition_of, refuse_too_large
from streaming.log.protocol import Entry, Log, Offsets, Output, Partition
from streaming.log.retention import Retention
from streaming.log.store import Database, Writer
from streaming.metrics import Metrics

LEASE_S = 10.0
"""A member that was not heard of for this long is dead, and its partitions go to others."""


class SQLiteLog(Log):
    """A run's log in a file. Safe to use from several threads; other processes open the file themselves."""

    def __init__(
        self,
        path: Path,
        *,
        run: str,
        max_record_bytes: int,
        max_bytes: int,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.time,
        vfs: str | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._path = path
        self._run = run
        self._max_record_bytes = max_record_bytes
        self._lease_s = lease_s
        self._clock = clock
        self._vfs = vfs
        self._metrics = metrics
        self._writer = Writer(path, vfs=vfs)
        self._reader = Database(path, vfs=vfs)
        self._reading = threading.Lock()
        self._retention = Retention(self._writer, run=run, max_bytes=max_bytes, clock=clock)
        self._layouts: dict[str, Layout] = {}
        self._consumers: WeakSet[SQLiteConsumer] = WeakSet()
        self._closing = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="log-leases", daemon=True)

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        placed = [self._place(output) for output in outputs]
        if not placed:
            return []
        now = self._clock()
        offsets = self._writer.run(lambda database: partitions.insert(database, placed, now))
        self._retention.appended(sum(len(record.output.value) for record in placed))
        return [(record.number, offset) for record, offset in zip(placed, offsets, strict=True)]

    def subscribe(self, group: str, topics: Sequence[str]) -> SQLiteConsumer:
        layout = {topic: self._layout(topic).ids for topic in topics}
        membership = Membership(self._writer, self._group(group), layout, lease_s=self._lease_s, clock=self._clock)
        consumer = self._open_consumer(topics, membership)
        with self._reading:
            if self._renewing.ident is None:
                self._renewing.start()
        return consumer

    def assign(self, offsets: Offsets) -> SQLiteConsumer:
        consumer = self._open_consumer({topic for topic, _ in offsets}, None)
        consumer.seek(offsets)
        return consumer

    def begin_offsets(self, topic: str) -> dict[Partition, int]:
        return self._per_partition(topic, partitions.begin_offset)

    def end_offsets(self, topic: str) -> dict[Partition, int]:
        return self._per_partition(topic, partitions.end_offset)

    def committed(self, group: str, topics: Sequence[str]) -> dict[Partition, int]:
        def offset(database: Database, partition: int) -> int:
            return partitions.committed_offset(database, self._group(group), partition)

        return {place: found for topic in topics for place, found in self._per_partition(topic, offset).items()}

    def newest(self, topic: str) -> dict[bytes, Entry]:
        layout = self._layout(topic)
        if not layout.is_compacted:
            raise LogError("it keeps no newest record per key", where=topic, do="Ask this of a compacted topic.")
        found: dict[bytes, Entry] = {}
        for number, partition in enumerate(layout.ids):
            with self._reading:
                rows = partitions.newest(self._reader, partition)
            for row_id, time_s, key, value in rows:
                found[key] = Entry(topic, number, row_id - (partition << OFFSET_BITS), key, value, time_s)
        return found

    def trim(self, offsets: Offsets) -> None:
        for (topic, number), offset in offsets.items():
            ids = self._layout(topic).ids
            if not 0 <= number < len(ids):
                raise LogError("there is no such partition", where=f"{topic}/{number}", do=f"There are {len(ids)}.")
            partitions.trim(self._writer, ids[number], offset)

    def rewrite(self, entries: Iterable[Entry]) -> int:
        """Replace the values at these entries' places by theirs, for good; returns how many there were.

        For erasing: not in the protocol, because Kafka cannot. Of topics that are not compacted.
        """
        placed = [(one.value, self._layout(one.topic).ids[one.partition], one.offset) for one in entries]
        found = self._writer.run(lambda database: partitions.rewrite(database, placed))
        with self._reading:
            self._reader.rows("PRAGMA wal_checkpoint(TRUNCATE)")  # the old bytes lie in the write-ahead log too
        return found

    def close(self) -> None:
        if self._closing.is_set():
            return
        for consumer in self._open_consumers():
            consumer.close()
        self._closing.set()
        if self._renewing.ident is not None:
            self._renewing.join()
        self._reader.close()
        self._writer.close()

    def _group(self, group: str) -> str:
        return f"{self._run}.{group}"

    def _layout(self, topic: str) -> Layout:
        """A topic's partitions; they are made at its first use and stay for ever."""
        found = self._layouts.get(topic)
        if found is None:
            stored, row = f"{self._run}.{topic}", table.find(topic)
            found = self._writer.run(lambda database: partitions.register(database, stored, row))
            self._layouts[topic] = found
        return found

    def _place(self, output: Output) -> Placed:
        refuse_too_large(output, self._max_record_bytes, setting="log.max_record_bytes")
        layout = self._layout(output.topic)
        number = partition_of(output.key, len(layout.ids))
        return Placed(layout.ids[number], number, layout.is_compacted, output)

    def _per_partition(self, topic: str, ask: Callable[[Database, int], int]) -> dict[Partition, int]:
        ids = self._layout(topic).ids
        with self._reading:
            return {(topic, number): ask(self._reader, partition) for number, partition in enumerate(ids)}

    def _open_consumer(self, topics: Iterable[str], membership: Membership | None) -> SQLiteConsumer:
        places = {
            partition: (topic, number) for topic in topics for number, partition in enumerate(self._layout(topic).ids)
        }
        consumer = SQLiteConsumer(Database(self._path, vfs=self._vfs), self._writer, places, membership)
        with self._reading:
            self._consumers.add(consumer)
        return consumer

    def _open_consumers(self) -> list[SQLiteConsumer]:
        """Those that somebody still refers to."""
        with self._reading:
            return list(self._consumers)

    def _renew(self) -> None:
        """Keep this process's members alive while they are busy. A dead process renews nothing."""
        while not self._closing.wait(self._lease_s / 3):
            members = [one.membership for one in self._open_consumers() if one.membership is not None]
            try:
                if members:
                    self._writer.run(partial(renew_all, members))
            except LogError:  # a file that stays broken stops the role itself, at its next read or append
                if self._metrics is not None:
                    self._metrics.count("lease_renewals_failed_total")
