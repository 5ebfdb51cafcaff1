"""Finding records without reading the whole log: by place, by time, by a number that only grows, newest first.

It reads outside every group and changes nothing. A search that has to look at entries one by one looks at keys and
decodes nothing.
"""

from collections.abc import Callable, Iterator

from streaming.errors import TrimmedError
from streaming.history import between
from streaming.log.protocol import Consumer, Entry, Log, Partition
from streaming.records import Source

_CHUNK = 4096
"""Entries of each partition that a search from the newest reads before it goes further back."""

_READ_S = 10.0
"""Everything asked for is durable already: a cluster's first answer may take seconds, no answer takes longer."""

_SLACK_S = 60.0
"""Clocks of the machines that append differ: a search by time begins so much earlier."""


def at(log: Log, source: Source) -> Entry | None:
    """The entry at this place; None where retention has taken it."""
    place = (source.topic, source.partition)
    begin = log.begin_offsets(source.topic).get(place)
    if begin is None or not begin <= source.offset < log.end_offsets(source.topic)[place]:
        return None
    try:
        with log.assign({place: source.offset}) as reader:
            return next((entry for entry in reader.read(max_records=1, timeout_s=_READ_S)), None)
    except TrimmedError:
        return None


def first_where(log: Log, topic: str, rank: Callable[[Entry], float | None], least: float) -> dict[Partition, int]:
    """Per partition the offset of the first entry whose rank is at least `least` (its end, where there is none).

    A bisection: ranks must not fall along a partition. An entry without a rank counts as the next one that has one.
    """
    ends = log.end_offsets(topic)
    return {
        place: _bisect(log, place, begin, ends[place], rank, least) for place, begin in log.begin_offsets(topic).items()
    }


def since(log: Log, topic: str, time_s: float) -> Iterator[Entry]:
    """What was appended from this Unix time on (and a little before it), each partition in its order."""
    begins = first_where(log, topic, lambda entry: entry.time_s, time_s - _SLACK_S)
    return between(log, begins, log.end_offsets(topic))


def newest_first(log: Log, topic: str) -> Iterator[Entry]:
    """All of a topic, chunk by chunk from its end: what people ask about is mostly new."""
    begins, ends = log.begin_offsets(topic), log.end_offsets(topic)
    while any(begins[place] < end for place, end in ends.items()):
        starts = {place: max(begins[place], end - _CHUNK) for place, end in ends.items()}
        yield from between(log, starts, ends)
        ends = starts


def _bisect(
    log: Log, place: Partition, begin: int, end: int, rank: Callable[[Entry], float | None], least: float
) -> int:
    low, high = begin, end
    if low == high:
        return end
    with log.assign({place: low}) as reader:
        while low < high:
            middle = (low + high) // 2
            reader.seek({place: middle})
            found = _next_rank(reader, place, end, rank)
            if found is None or found >= least:
                high = middle
            else:
                low = middle + 1
    return low


def _next_rank(reader: Consumer, place: Partition, end: int, rank: Callable[[Entry], float | None]) -> float | None:
    while reader.positions()[place] < end:
        for entry in reader.read(max_records=1, timeout_s=_READ_S):
            if (found := rank(entry)) is not None:
                return found
    return None
