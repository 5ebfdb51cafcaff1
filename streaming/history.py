"""Reading what a log already holds: between two offsets and no further. Changes nothing, joins no group."""

from collections.abc import Iterable, Iterator

from streaming.errors import RecordError
from streaming.log.protocol import Entry, Log, Offsets
from streaming.records import R, decode

_MAX_RECORDS = 1024
"""Entries read at once."""

_READ_S = 1.0
"""Everything asked for is durable already: a read that finds nothing for so long is tried again."""


def records(log: Log, topic: str, kind: type[R]) -> Iterator[tuple[Entry, R]]:
    """Every record that a topic holds at the moment of the first read, and the entry that it stands in."""
    return decoded(kind, entries(log, topic))


def decoded(kind: type[R], found: Iterable[Entry]) -> Iterator[tuple[Entry, R]]:
    """The records in these entries. What is none is passed over: the topic's own reader has dead-lettered it."""
    for entry in found:
        try:
            record = decode(kind, entry.value, where=entry.where)
        except RecordError:
            continue
        yield entry, record


def entries(log: Log, topic: str) -> Iterator[Entry]:
    """Everything that a topic holds at the moment of the first read, each partition in its order."""
    return between(log, log.begin_offsets(topic), log.end_offsets(topic))


def before(log: Log, ends: Offsets, count: int) -> Iterator[Entry]:
    """The newest `count` entries of each partition before `ends`, fewer where retention has taken some."""
    begins = {
        place: begin for topic in {topic for topic, _ in ends} for place, begin in log.begin_offsets(topic).items()
    }
    return between(log, {place: max(begins[place], end - count) for place, end in ends.items()}, ends)


def between(log: Log, begins: Offsets, ends: Offsets) -> Iterator[Entry]:
    """The entries from `begins` up to, and without, `ends`; each partition in its order.

    Raises TrimmedError where retention overtakes the reading.
    """
    waiting = {place: begin for place, begin in begins.items() if begin < ends[place]}
    if not waiting:
        return
    with log.assign(waiting) as consumer:
        while any(offset < ends[place] for place, offset in consumer.positions().items()):
            for entry in consumer.read(max_records=_MAX_RECORDS, timeout_s=_READ_S):
                if entry.offset < ends[entry.topic, entry.partition]:
                    yield entry
