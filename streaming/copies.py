"""Copies: a record that lies in the log once more, because a crash or a lost acknowledgement repeated it.

    entries that follow nothing this member has read -> the ids before them are recalled -> a copy is recognised

The first record of an id in its partition wins, whoever answered it: a member that takes a partition over knows what
its earlier holder knew. Memory is bounded by ids, not by partitions: the oldest are forgotten.

    answered (durable) -> not committed: its entry is read again, and is a copy of itself
    a dead letter whose end was told -> a copy of it, or the same entry again, needs nothing -> sent again: it is done
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from streaming import topics
from streaming.dead_letters import DeadLetters
from streaming.errors import RecordError, TrimmedError
from streaming.history import before, decoded
from streaming.keys import group_under
from streaming.log.by_reference import unfetched
from streaming.log.outlines import LetterOutline
from streaming.log.protocol import Consumer, Entry, Log, Offsets, Partition
from streaming.records import Feedback, decode

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

    def __init__(self, log: Log, identify: Identify, dead: DeadLetters, *, outputs: Sequence[str] = ()) -> None:
        """`dead`: of the stage that the member is of. `outputs`: topics whose keys name the groups it answered."""
        self._log = unfetched(log)
        self._outputs = outputs
        self.identify = identify
        self._dead = dead
        self._ids: OrderedDict[str, bool] = OrderedDict()  # each, whether it died; the newest answered or recalled last
        self._dead_places: set[tuple[str, int, int]] = set()  # when a partition was last taken up
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
        self._recall(taken_up)
        self._next |= taken_up
        return True

    def passed(self, entry: Entry) -> None:
        """This entry is answered, or will be by this member: what follows it follows what is known."""
        self._next[entry.topic, entry.partition] = entry.offset + 1

    def hand_over(self, place: Partition) -> None:
        """What was passed here and is not answered is another member's: if the partition comes back, catch up."""
        self._next.pop(place, None)

    def is_copy(self, one: str, entry: Entry) -> bool:
        """Whether nothing is to be done for an entry of this id.

        An entry that died itself is read again where its end was told and not committed.
        """
        if one not in self._ids and self.died(entry):
            self.bury(one)
        return one in self._ids and (not self._ids[one] or self._dead.has_ended(one))

    def died(self, entry: Entry) -> bool:
        """Whether this very entry is a dead letter, as another holder of its partition or an earlier start wrote it."""
        return _place(entry) in self._dead_places

    def add(self, ids: Iterable[str]) -> None:
        """These are answered: whatever has one of them from now on is a copy."""
        self._note(dict.fromkeys(ids, False))

    def discard(self, one: str) -> None:
        """This is not answered after all: another member answers it."""
        self._ids.pop(one, None)

    def bury(self, one: str) -> None:
        """This became a dead letter: whatever has its id from now on is a copy, until it is sent again."""
        self._note({one: True})

    def _note(self, ids: Mapping[str, bool]) -> None:
        for one, is_dead in ids.items():
            self._ids[one] = is_dead
            self._ids.move_to_end(one)
        while len(self._ids) > MAX_SEEN:
            self._ids.popitem(last=False)

    def _not_next(self, begins: Offsets) -> dict[Partition, int]:
        return {place: offset for place, offset in begins.items() if offset != self._next.get(place)}

    def _recall(self, ends: Offsets) -> None:
        """The ids just before these offsets, and of what lies behind them those that are answered already.

        Of one that died, what lies behind it may be what was sent again, or a copy that was passed over: nobody can
        tell, and what is done twice is a copy to whoever reads it. So it stays dead.
        """
        while True:
            try:
                recent = list(before(self._log, ends, RECALLED_PER_PARTITION))
                self._dead_places = dead_places(self._newest(topics.DEAD_LETTER.name, DEAD_PER_PARTITION))
                answered = self._answered(ends)
            except TrimmedError:  # retention has overtaken the reading: less is left to be known
                continue
            found: dict[str, bool] = {}
            for entry in recent:
                one, is_dead = self._known_of(entry)
                if one is not None:
                    found[one] = found.get(one, False) or is_dead
            return self._note(found | answered)

    def _answered(self, ends: Offsets) -> dict[str, bool]:
        """The groups that the newest answers are about, and whether each died."""
        found = {}
        for _, one in decoded(Feedback, self._newest(topics.FEEDBACK.name, RECALLED_PER_PARTITION)):
            if self._dead.is_ours(one) and one.ending != "consumed":
                found[one.group_id] = one.ending in ("dead_lettered", "redriven")
        for topic in self._outputs:
            keys = [entry.key for entry in self._newest(topic, RECALLED_PER_PARTITION, beside=ends)]
            found |= {group_id: False for key in keys if (group_id := group_under(key)) is not None}
        return found

    def _newest(self, topic: str, count: int, *, beside: Offsets | None = None) -> Iterator[Entry]:
        """The newest entries of a topic. `beside`: of these partitions only, where it has the same keys and as many."""
        ends = self._log.end_offsets(topic)
        if beside is not None and all(self._is_like(topic, other, len(ends)) for other, _ in beside):
            numbers = {number for _, number in beside}
            ends = {place: end for place, end in ends.items() if place[1] in numbers}
        return before(self._log, ends, count)

    def _is_like(self, topic: str, other: str, num_partitions: int) -> bool:
        rows = topics.find(topic), topics.find(other)
        has_same_keys = None not in rows and len({row.key for row in rows if row is not None}) == 1
        return has_same_keys and len(self._log.end_offsets(other)) == num_partitions

    def _known_of(self, entry: Entry) -> tuple[str | None, bool]:
        """The id of an entry that lies behind, and whether it died. Nobody can read every one that did."""
        try:
            return self.identify(entry), _place(entry) in self._dead_places
        except RecordError:
            return group_under(entry.key), True


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
