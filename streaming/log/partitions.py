"""The statements on partitions and their records, each inside whatever transaction its caller has open.

A record's row id is its place: partition id times 2^40 plus offset. So a partition is a range of the table, its end
is its last row, and reading on is a seek.
"""

from collections.abc import Sequence
from typing import NamedTuple

from streaming.log.compaction import is_superseded
from streaming.log.protocol import Output
from streaming.log.store import Database, Row, Writer
from streaming.topics import Topic

OFFSET_BITS = 40
"""A million million records per partition; eight million partitions."""

_CHUNK = 500
"""Records deleted in one transaction: others write in between."""


class Layout(NamedTuple):
    """A topic as it lies in this file."""

    ids: list[int]  # of its partitions, by number; consecutive
    is_compacted: bool


class Placed(NamedTuple):
    """A record that knows its partition, and not its offset yet."""

    partition: int
    number: int
    is_compacted: bool
    output: Output


def span(partition: int) -> tuple[int, int]:
    """The row ids of a partition's first and last possible record."""
    return partition << OFFSET_BITS, ((partition + 1) << OFFSET_BITS) - 1


def register(database: Database, stored_topic: str, topic: Topic | None) -> Layout:
    """A topic's partitions, made at its first use; a topic that is in no table has one."""
    found = database.rows("SELECT id, is_compacted FROM partitions WHERE topic = ? ORDER BY number", [stored_topic])
    if not found:
        num_partitions, is_compacted = (topic.partitions, topic.compacted) if topic else (1, False)
        rows = [(stored_topic, number, is_compacted) for number in range(num_partitions)]
        database.many("INSERT INTO partitions (topic, number, is_compacted) VALUES (?, ?, ?)", rows)
        return register(database, stored_topic, topic)
    return Layout([partition for partition, _ in found], bool(found[0][1]))


def insert(database: Database, placed: Sequence[Placed], time_s: float) -> list[int]:
    """Append the records and return their offsets."""
    ends: dict[int, int] = {}
    rows, offsets = [], []
    for record in placed:
        partition = record.partition
        offset = ends[partition] if partition in ends else end_offset(database, partition)
        ends[partition] = offset + 1
        offsets.append(offset)
        rows.append(((partition << OFFSET_BITS) + offset, time_s, record.output.key, record.output.value))
    database.many("INSERT INTO records VALUES (?, ?, ?, ?)", rows)
    for record, row in zip(placed, rows, strict=True):
        if record.is_compacted:
            _supersede(database, record, row[0])
    return offsets


def read(database: Database, partition: int, offset: int, max_records: int) -> list[Row]:
    """Rows of (id, time, key, value) from an offset on."""
    first, last = span(partition)
    return database.rows(
        "SELECT id, time_s, key, value FROM records WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?",
        (first + offset, last, max_records),
    )


def begin_offset(database: Database, partition: int) -> int:
    """The oldest offset that is not trimmed."""
    return int(database.value("SELECT begin FROM partitions WHERE id = ?", (partition,)))


def end_offset(database: Database, partition: int) -> int:
    """The offset that the partition's next record gets."""
    first, last = span(partition)
    newest = database.value("SELECT id FROM records WHERE id BETWEEN ? AND ? ORDER BY id DESC LIMIT 1", (first, last))
    return begin_offset(database, partition) if newest is None else int(newest) + 1 - first


def committed_offset(database: Database, group: str, partition: int) -> int:
    """Where the group goes on: what it committed, or the beginning."""
    found = database.value("SELECT offset FROM committed WHERE name = ? AND partition = ?", (group, partition))
    return begin_offset(database, partition) if found is None else int(found)


def newest(database: Database, partition: int) -> list[Row]:
    """Rows of (id, time, key, value): each key's newest, of a compacted topic."""
    return database.rows(
        "SELECT id, time_s, records.key, value FROM newest JOIN records USING (id) WHERE partition = ?", (partition,)
    )


def first_since(database: Database, partition: int, time_s: float) -> int:
    """The first offset that was appended at `time_s` or later. Offsets are dense, so a binary search finds it."""
    low, high = begin_offset(database, partition), end_offset(database, partition)
    while low < high:
        middle = (low + high) // 2
        found = database.value("SELECT time_s FROM records WHERE id = ?", (span(partition)[0] + middle,))
        if found is not None and found < time_s:
            low = middle + 1
        else:
            high = middle
    return low


def first_unread(database: Database, partition: int) -> int:
    """The first offset that some group has not committed; the end where no group reads this partition."""
    found = database.value("SELECT min(offset) FROM committed WHERE partition = ?", [partition])
    return end_offset(database, partition) if found is None else int(found)


def behind_oldest(database: Database, partition: int, num_bytes: float) -> int:
    """The offset behind the oldest records that take `num_bytes` together: one of them at least, a chunk at most."""
    first, last = span(partition)
    rows = database.rows(
        "SELECT id, length(value) FROM records WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?", (first, last, _CHUNK)
    )
    for row_id, size in rows:
        num_bytes -= size
        if num_bytes <= 0:
            return int(row_id) + 1 - first
    return int(rows[-1][0]) + 1 - first


def trim(writer: Writer, partition: int, begin: int) -> None:
    """Forget a partition's records before the offset `begin`; at most up to its end."""
    first = span(partition)[0]

    def mark(database: Database) -> int:
        until = min(begin, end_offset(database, partition))
        database.rows("UPDATE partitions SET begin = max(begin, ?) WHERE id = ?", (until, partition))
        database.rows("DELETE FROM newest WHERE partition = ? AND id < ?", (partition, first + until))
        return until

    def delete(database: Database) -> int:
        rows = database.rows(
            "SELECT id FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT ?", (first, first + until, _CHUNK)
        )
        if rows:
            database.rows("DELETE FROM records WHERE id BETWEEN ? AND ?", (rows[0][0], rows[-1][0]))
        return len(rows)

    until = writer.run(mark)
    while writer.run(delete) == _CHUNK:
        pass


def rewrite(database: Database, values: Sequence[tuple[bytes, int, int]]) -> int:
    """Put another value at places (partition, offset); returns how many there were. The old bytes are zeroed.

    A place stays: offsets are dense, and readers count on it.
    """
    database.rows("PRAGMA secure_delete = ON")
    found = 0
    for value, partition, offset in values:
        database.rows("UPDATE records SET value = ? WHERE id = ?", (value, span(partition)[0] + offset))
        found += database.num_changes()
    return found


def _supersede(database: Database, record: Placed, row_id: int) -> None:
    """This row is the key's newest: the one before it goes. Bytes that are no record stay beside a record."""
    partition, output = record.partition, record.output
    before = database.rows(
        "SELECT id, value FROM newest JOIN records USING (id) WHERE partition = ? AND newest.key = ?",
        (partition, output.key),
    )
    for before_id, value in before:
        if not is_superseded(output.topic, value, output.value):
            return
        database.rows("DELETE FROM records WHERE id = ?", (before_id,))
    database.rows("INSERT OR REPLACE INTO newest VALUES (?, ?, ?)", (partition, output.key, row_id))
