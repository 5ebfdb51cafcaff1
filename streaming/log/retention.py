"""How the embedded log forgets: by its topics' age and by the file's size, the oldest records first.

Only topics that are not compacted are trimmed; a compacted one holds a record per key. Age takes nothing that a group
has still to read: a run that stood still for a week, or a clock that jumped, would lose it. The size is a hard limit.
"""

import threading
from collections.abc import Callable
from functools import partial

from streaming import topics
from streaming.log.partitions import behind_oldest, first_since, first_unread, span, trim
from streaming.log.store import Database, Writer

_LOOK_S = 30.0
"""Between two looks at age and size: they cost a few dozen seeks and a transaction."""

_LOOK_SHARE = 1 / 32
"""A look is due earlier after this share of max_bytes was appended, so the size overshoots by no more."""

_KEEP_SHARE = 0.9
"""Of max_bytes, what a trim leaves: so that trims are rare."""

_STEP_SHARE = 1 / 8
"""Of what is too much, what one step takes from the partition with the oldest record: so that none is emptied."""


class Retention:
    """Told of every append, and seldom does anything."""

    def __init__(self, writer: Writer, *, run: str, max_bytes: int, clock: Callable[[], float]) -> None:
        self._writer = writer
        self._prefix = f"{run}."
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._looked_s = -_LOOK_S
        self._num_bytes = 0

    def appended(self, num_bytes: int) -> None:
        """Note an append, and trim where it is time."""
        with self._lock:
            self._num_bytes += num_bytes
            is_early = 0 <= self._clock() - self._looked_s < _LOOK_S  # a clock that has gone back puts nothing off
            if is_early and self._num_bytes < self._max_bytes * _LOOK_SHARE:
                return
            self._looked_s = self._clock()
            self._num_bytes = 0
        self._trim_by_age()
        if self._writer.run(_used_bytes) > self._max_bytes:
            self._trim_by_size()

    def _trim_by_age(self) -> None:
        """Forget what is older than its topic's retention."""
        for partition, begin in self._writer.run(self._expired):
            trim(self._writer, partition, begin)

    def _trim_by_size(self) -> None:
        """Forget the run's oldest records until enough is free."""
        while (excess := self._writer.run(_used_bytes) - self._max_bytes * _KEEP_SHARE) > 0:
            oldest = self._writer.run(partial(self._oldest, excess * _STEP_SHARE))
            if oldest is None:
                return
            trim(self._writer, *oldest)

    def _expired(self, database: Database) -> list[tuple[int, int]]:
        """Where each partition should begin by now, if that is not where it begins."""
        found = []
        for partition, stored_topic, begin in self._partitions(database):
            topic = topics.find(stored_topic.removeprefix(self._prefix))
            if topic is not None and topic.retention_s is not None:
                young = first_since(database, partition, self._clock() - topic.retention_s)
                alive = min(young, first_unread(database, partition))
                if alive > begin:
                    found.append((partition, alive))
        return found

    def _oldest(self, num_bytes: float, database: Database) -> tuple[int, int] | None:
        """The partition with the oldest record, and where it begins without its oldest `num_bytes`."""
        heads = []
        for partition, _, _ in self._partitions(database):
            head = database.value(
                "SELECT time_s FROM records WHERE id BETWEEN ? AND ? ORDER BY id LIMIT 1", span(partition)
            )
            if head is not None:
                heads.append((head, partition))
        if not heads:
            return None
        _, partition = min(heads)
        return partition, behind_oldest(database, partition, num_bytes)

    def _partitions(self, database: Database) -> list[tuple[int, str, int]]:
        """This run's partitions that may be trimmed: id, stored topic, begin."""
        rows = database.rows("SELECT id, topic, begin FROM partitions WHERE NOT is_compacted")
        return [(partition, topic, begin) for partition, topic, begin in rows if topic.startswith(self._prefix)]


def _used_bytes(database: Database) -> int:
    num_pages = database.value("PRAGMA page_count") - database.value("PRAGMA freelist_count")
    return int(num_pages * database.value("PRAGMA page_size"))
