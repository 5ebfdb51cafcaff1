"""The newest record of every key of a compacted topic: read whole once, and then only what is new.

A tombstone takes its key out, unless a newer record put it in again. A key always lies in the same partition, so their
offsets say which of the two came last.
"""

import threading
from typing import TYPE_CHECKING

from streaming.errors import TrimmedError
from streaming.log.compaction import is_superseded
from streaming.log.kafka_consumer import LogConsumer
from streaming.log.protocol import Entry, Offsets

if TYPE_CHECKING:
    from streaming.log.kafka import KafkaLog

_MAX_RECORDS = 1024
"""Of one read."""


class Newest:
    """A follower of one topic. Safe to use from several threads."""

    def __init__(self, log: "KafkaLog", topic: str) -> None:
        self._log = log
        self._topic = topic
        self._lock = threading.Lock()
        self._reader: LogConsumer | None = None
        self._found: dict[bytes, Entry] = {}
        self._deleted: dict[bytes, int] = {}  # key -> offset of its tombstone, since the newest look

    def look(self) -> dict[bytes, Entry]:
        """What was newest when this was called, or is newer. Waits for a cluster that is away, as every question does.

        Raises LogError where it stays away: what was found so far may lack anything.
        """
        ends = self._log.end_offsets(self._topic)
        with self._lock:
            try:
                self._read_to(ends)
            except TrimmedError:
                self._start()
                self._read_to(ends)
            return dict(self._found)

    def _read_to(self, ends: Offsets) -> None:
        if self._reader is None:
            self._start()
        assert self._reader is not None
        while any(offset < ends[place] for place, offset in self._reader.positions().items()):
            entries = self._reader.read(max_records=_MAX_RECORDS, timeout_s=0)
            for entry in entries:
                self._take(entry)
            if not entries:
                self._log.end_offsets(self._topic)  # to wait: there is more, and the cluster did not deliver it
        for key, offset in self._deleted.items():
            if key in self._found and self._found[key].offset < offset:
                del self._found[key]
        self._deleted.clear()

    def _take(self, entry: Entry) -> None:
        before = self._found.get(entry.key)
        if before is None or is_superseded(self._topic, before.value, entry.value):
            self._found[entry.key] = entry

    def _start(self) -> None:
        begins = self._log.begin_offsets(self._topic)
        self._found.clear()
        self._deleted.clear()
        if self._reader is None:
            self._reader = self._log.follow(begins, self._deleted.__setitem__)
        else:
            self._reader.seek(begins)
