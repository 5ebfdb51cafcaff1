"""Removes the blobs that no readable record names any more, topic by topic, now and then, in a thread of its own.

an append -> is a sweep due? -> listed -> compared with where the topic begins -> removed
"""

import threading
from collections.abc import Callable, Iterable, Sequence

from streaming import topics
from streaming.blobs import Blob, BlobStore
from streaming.errors import LogError, StreamDPOError
from streaming.log.protocol import Log, Offsets, Partition

SWEEP_S = 600.0
"""Between two sweeps of a topic: each costs a listing and a look at the oldest record of every partition."""

SLACK_S = 3600.0
"""A blob of which nobody knows whether a record names it stays this much longer than its topic's records: clocks
differ, and appends wait for brokers."""

MAX_REMOVED = 1000
"""Blobs that one sweep removes at most, the oldest first."""

_LOOK_S = 5.0
"""How long a sweep waits for a partition's oldest record."""


class Sweeper:
    """Of one process. Several of them may sweep at once.

    A blob goes when the log has forgotten every record that is known to name it, in whatever way and for whatever
    reason the backend forgets. One that no record is known to name (an append that failed, or a crash behind it) goes
    when its topic's retention has passed and it is older than any record there. What is kept for ever
    keeps its blobs.
    """

    def __init__(self, log: Log, blobs: BlobStore, *, clock: Callable[[], float]) -> None:
        self._log = log
        self._blobs = blobs
        self._clock = clock
        self._due_s: dict[str, float] = {}
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def appended(self, names: Iterable[str]) -> None:
        """Note an append, and sweep where it is time; returns at once."""
        now_s = self._clock()
        with self._lock:
            if self._closing.is_set() or (self._thread is not None and self._thread.is_alive()):
                return
            due = [name for name in names if now_s >= self._due_s.setdefault(name, now_s + SWEEP_S)]
            if due:
                self._due_s.update(dict.fromkeys(due, now_s + SWEEP_S))
                self._thread = threading.Thread(target=self._sweep_all, args=(due,), name="blob-sweep", daemon=True)
                self._thread.start()

    def sweep(self, name: str) -> int:
        """Remove a topic's blobs that are of no use any more; returns how many. Raises LogError."""
        topic = topics.find(name)
        if topic is None or topic.retention_s is None:
            return 0
        blobs = self._blobs.blobs(name)
        if not blobs:
            return 0
        begins, ends = self._log.begin_offsets(name), self._log.end_offsets(name)
        places = {blob: _places_in(name, blob, ends) for blob in blobs}
        useless = [
            blob for blob, known in places.items() if known and all(offset < begins[place] for place, offset in known)
        ]
        if unknown := [blob for blob, known in places.items() if not known]:
            useless += self._outlived(unknown, self._oldest_s(begins, ends), topic.retention_s)
        oldest = sorted(useless, key=lambda blob: blob.modified_s)[:MAX_REMOVED]
        return sum(self._blobs.remove(blob) for blob in oldest if not self._closing.is_set())

    def close(self) -> None:
        """Cut a sweep short that is under way, and wait for it."""
        with self._lock:
            self._closing.set()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _sweep_all(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self.sweep(name)
            except StreamDPOError:
                # What appends and reads need of the log and the store fails there, loudly. The next sweep tries again.
                self._blobs.count("sweep_failed")

    def _outlived(self, blobs: Iterable[Blob], oldest_s: float, retention_s: int) -> list[Blob]:
        horizon_s = min(oldest_s, self._clock() - retention_s) - SLACK_S
        return [blob for blob in blobs if blob.modified_s < horizon_s]

    def _oldest_s(self, begins: Offsets, ends: Offsets) -> float:
        """When the oldest record that anybody can still read was appended; now where there is none."""
        return min([self._clock(), *(self._time_s(place, at) for place, at in begins.items() if at < ends[place])])

    def _time_s(self, place: Partition, offset: int) -> float:
        with self._log.assign({place: offset}) as consumer:
            entries = consumer.read(max_records=1, timeout_s=_LOOK_S)
        if not entries:
            raise LogError(
                "its oldest record did not come", where=f"{place[0]}/{place[1]}@{offset}", do="Look again later."
            )
        return entries[0].time_s


def _places_in(topic: str, blob: Blob, ends: Offsets) -> list[tuple[Partition, int]]:
    """The records of this log that name the blob. A place beyond the end is one in another log, which was lost."""
    places = [((topic, place.partition), place.offset) for place in blob.places]
    return [(place, offset) for place, offset in places if offset < ends.get(place, 0)]
