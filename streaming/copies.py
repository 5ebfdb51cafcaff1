"""Copies: a record that lies in the log once more, because a crash or a lost acknowledgement repeated it.

    entries that follow nothing this member has read -> the ids before them are recalled -> a copy is recognised

The first record of an id in its partition wins, whoever answered it: a member that takes a partition over knows what
its earlier holder knew. Memory is bounded by ids, not by partitions: the oldest are forgotten.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence

from streaming import topics
from streaming.errors import RecordError, TrimmedError
from streaming.history import before
from streaming.log.by_reference import unfetched
from streaming.log.outlines import LetterOutline
from streaming.log.protocol import Consumer, Entry, Log, Offsets, Partition
from streaming.records import decode

Identify = Callable[[Entry], str]
"""The id by which a copy is recognised. Raises RecordError where its bytes are no record."""

MAX_SEEN = 65536
"""Ids remembered: far more than lie between two copies of one record in the log (a few megabytes)."""

RECALLED_PER_PARTITION = 256
"""Entries whose ids are read back where a partition is taken up: more than any writer has in flight."""

DEAD_PER_PARTITION = 1024
"""Newest dead letters that are looked through then: what died before them lies before the ids recalled."""


class Copies:
    """What one member of a group recognises copies by. Belongs to one thread."""

    def __init__(self, log: Log, identify: Identify) -> None:
        self._log = unfetched(log)
        self.identify = identify
        self._ids: OrderedDict[str, None] = OrderedDict()  # in the order in which they were answered or recalled
        self._next: dict[Partition, int] = {}

    def catch_up(self, entries: Sequence[Entry], consumer: Consumer) -> bool:
        """Before these entries, which `consumer` has just read, are worked on: know what lies before them.

        Nothing is read where all of them go on where this member stood. Returns whether one does not: its partition
        is new, or was another member's in between.
        """
        begins: dict[Partition, int] = {}
        for entry in entries:
            begins.setdefault((entry.topic, entry.partition), entry.offset)
        if not self._not_next(begins):
            return False
        taken_up = self._not_next({**consumer.positions(), **begins})  # all at once: dead letters are read for it
        self.add(self._before(taken_up))
        self._next |= taken_up
        return True

    def passed(self, entry: Entry) -> None:
        """This entry is answered, or will be by this member: what follows it follows what is known."""
        self._next[entry.topic, entry.partition] = entry.offset + 1

    def hand_over(self, place: Partition) -> None:
        """What was passed here and is not answered is another member's: if the partition comes back, catch up."""
        self._next.pop(place, None)

    def add(self, ids: Iterable[str]) -> None:
        """These are answered: whatever has one of them from now on is a copy."""
        for one in ids:
            self._ids[one] = None
            self._ids.move_to_end(one)
        while len(self._ids) > MAX_SEEN:
            self._ids.popitem(last=False)

    def discard(self, one: str) -> None:
        """This became a dead letter: if it comes again, that is to be done."""
        self._ids.pop(one, None)

    def __contains__(self, one: object) -> bool:
        return one in self._ids

    def _not_next(self, begins: Offsets) -> dict[Partition, int]:
        return {place: offset for place, offset in begins.items() if offset != self._next.get(place, 0)}

    def _before(self, ends: Offsets) -> list[str]:
        """The ids just before these offsets, but for dead letters: if one of these comes again, that is to be done.

        `streamdpo redrive` sends their bytes again.
        """
        while True:
            try:
                recent = before(self._log, ends, RECALLED_PER_PARTITION)
                found = {_place(entry): one for entry in recent if (one := self._id_of(entry)) is not None}
                dead = dead_places(self._newest_letters()) if found else set()
            except TrimmedError:  # retention has overtaken the reading: less is left to be known
                continue
            return [one for place, one in found.items() if place not in dead]

    def _newest_letters(self) -> Iterator[Entry]:
        return before(self._log, self._log.end_offsets(topics.DEAD_LETTER.name), DEAD_PER_PARTITION)

    def _id_of(self, entry: Entry) -> str | None:
        try:
            return self.identify(entry)
        except RecordError:
            return None  # it is a dead letter already, and a copy of it becomes another


def dead_places(letters: Iterable[Entry]) -> set[tuple[str, int, int]]:
    """Topic, partition and offset of what became one of these dead letters."""
    sources = []
    for entry in letters:
        try:
            sources.append(decode(LetterOutline, entry.value, where=entry.where).source)
        except RecordError:
            continue
    return {(source.topic, source.partition, source.offset) for source in sources}


def _place(entry: Entry) -> tuple[str, int, int]:
    return entry.topic, entry.partition, entry.offset
