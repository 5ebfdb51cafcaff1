"""A position in the embedded log: a member of a group, or a reader of named partitions.

look -> entries, or nothing -> wait for this process's next append, or look again every few milliseconds -> look
"""

import time
from collections.abc import Mapping

from streaming.errors import LeaseLostError, LogError, TrimmedError
from streaming.log.leases import Membership
from streaming.log.partitions import OFFSET_BITS, begin_offset, committed_offset, end_offset, read
from streaming.log.protocol import Consumer, Entry, Offsets, Partition
from streaming.log.store import Database, Row, Writer

_FIRST_POLL_S = 0.002
"""First wait before looking whether another process has appended; each further wait is twice as long,"""

_LAST_POLL_S = 0.02
"""up to this: fifty cheap looks a second."""

_OFFSET_MASK = (1 << OFFSET_BITS) - 1


class SQLiteConsumer(Consumer):
    """Belongs to one thread. `places` maps the id of each partition it may read to its topic and number."""

    def __init__(
        self, database: Database, writer: Writer, places: Mapping[int, Partition], membership: Membership | None
    ) -> None:
        self.membership = membership
        self._database = database
        self._writer = writer
        self._places = places
        self._ids = {place: partition for partition, place in places.items()}
        self._positions: dict[int, int] = {}
        self._leases: dict[int, int] = {}
        self._empty_at: int | None = None  # the file's version at which there was nothing more to read
        self._turn = 0
        self._is_closed = False
        self._follow_leases()

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        deadline_s = time.monotonic() + timeout_s
        pause_s = _FIRST_POLL_S
        while True:
            num_commits = self._writer.num_commits
            entries = self._look(max_records)
            left_s = deadline_s - time.monotonic()
            if entries or left_s <= 0:
                return entries
            self._writer.wait(num_commits, min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LAST_POLL_S)

    def commit(self, offsets: Offsets) -> None:
        if self.membership is None:
            raise LogError("a reader without a group has nothing to commit", where="commit", do="Use subscribe().")
        for place in offsets:
            if self._ids.get(place) not in self._positions:
                raise LeaseLostError(
                    "this member does not hold the partition",
                    where=f"group {self.membership.group}, {place[0]}/{place[1]}",
                    do="Nothing was committed. Read on: the holder does the work again.",
                )
        self.membership.commit({self._ids[place]: offset for place, offset in offsets.items()})

    def seek(self, offsets: Offsets) -> None:
        for place, offset in offsets.items():
            partition = self._ids.get(place)
            if partition is None or (self.membership is not None and partition not in self._positions):
                raise LogError(
                    "this reader does not hold the partition", where=f"{place[0]}/{place[1]}", do="Seek what it holds."
                )
            if offset > (end := end_offset(self._database, partition)):
                raise LogError(
                    f"offset {offset} is beyond the end, {end}",
                    where=f"{place[0]}/{place[1]}",
                    do="This is not the log that the offset was taken from: use the run's own log file.",
                )
            self._positions[partition] = offset
        self._empty_at = None

    def positions(self) -> dict[Partition, int]:
        return {self._places[partition]: offset for partition, offset in self._positions.items()}

    def behind(self) -> dict[Partition, int]:
        return {
            self._places[partition]: end_offset(self._database, partition) - offset
            for partition, offset in self._positions.items()
        }

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        if self.membership is not None:
            self.membership.leave()
        self._database.close()

    def _look(self, max_records: int) -> list[Entry]:
        """What is there now. Costs one cheap statement where nothing has changed since nothing was there."""
        if self.membership is not None and self.membership.is_due():
            self._balance(self.membership)
        version = self._database.version()
        if version == self._empty_at:
            return []
        entries = self._fetch(max_records)
        # The lease is looked at after the rows: what was fetched under a lease that is lost by now is not given out.
        while self.membership is not None and self.membership.is_stale(self._database):
            self._balance(self.membership)
            entries = self._fetch(max_records)
        self._empty_at = None if entries else version
        for entry in entries:
            self._positions[self._ids[entry.topic, entry.partition]] = entry.offset + 1
        return entries

    def _fetch(self, max_records: int) -> list[Entry]:
        """Up to so many entries, beginning with another partition each time so that none waits for ever."""
        entries: list[Entry] = []
        held = list(self._positions)
        self._turn += 1
        for i in range(len(held)):
            partition = held[(self._turn + i) % len(held)]
            rows = read(self._database, partition, self._positions[partition], max_records - len(entries))
            self._check_trimmed(partition, rows)
            topic, number = self._places[partition]
            entries += [Entry(topic, number, row[0] & _OFFSET_MASK, row[2], row[3], row[1]) for row in rows]
            if len(entries) == max_records:
                break
        return entries

    def _check_trimmed(self, partition: int, rows: list[Row]) -> None:
        """Looked at after the rows, so that a trim in between is never missed."""
        position = self._positions[partition]
        if rows and rows[0][0] & _OFFSET_MASK == position:
            return
        begin = begin_offset(self._database, partition)
        if position < begin:
            topic, number = self._places[partition]
            raise TrimmedError(
                f"offsets {position} to {begin - 1} have passed retention",
                where=f"{topic}/{number}@{position}",
                do="These records are gone. Raise log.max_bytes for the next run; seek to the beginning to go on.",
            )

    def _balance(self, membership: Membership) -> None:
        membership.balance()
        self._follow_leases()

    def _follow_leases(self) -> None:
        """Begin at the committed offset of what is newly held, stay where we are in what is still held."""
        if self.membership is None:
            return
        held = self.membership.held
        self._positions = {
            partition: self._positions[partition]
            if self._leases.get(partition) == generation
            else committed_offset(self._database, self.membership.group, partition)
            for partition, generation in held.items()
        }
        self._leases = dict(held)
        self._empty_at = None
