"""The log: what Kafka and SQLite both promise. `tests/contract/test_log.py` holds either to it.

A topic has partitions; a key always falls into the same one, and a partition keeps its order. Delivery is at
least once: a crash between an append and a commit makes the same records appear again, and readers recognise
them by their deterministic ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

Partition = tuple[str, int]
"""(topic, partition number)."""

Offsets = Mapping[Partition, int]
"""(topic, partition) -> the NEXT offset to read, never the last one read."""


class Entry(NamedTuple):
    """A record as it lies in the log."""

    topic: str
    partition: int
    offset: int
    key: bytes
    value: bytes
    time_s: float  # Unix time of the append

    @property
    def where(self) -> str:
        return f"{self.topic}/{self.partition}@{self.offset}"


class Output(NamedTuple):
    """A record to append."""

    topic: str
    key: bytes
    value: bytes


class Consumer(Protocol):
    """A position in the log. Not safe to share between threads."""

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        """The next durable entries, at most `max_records`; waits up to `timeout_s` for the first, then is empty.

        Reading advances this member's position only. Raises TrimmedError where the position has passed retention.
        """

    def commit(self, offsets: Offsets) -> None:
        """Make `offsets` the place where the group goes on after a restart. Durable on return.

        Raises LeaseLostError (and commits nothing) where another member owns one of the partitions by now.
        A consumer without a group has nothing to commit: LogError.
        """

    def seek(self, offsets: Offsets) -> None:
        """Read on from here. Raises TrimmedError at the next read where the offset has passed retention.

        An offset beyond the end is from another log: LogError, here or at the next read (so it is for `assign`).
        """

    def positions(self) -> dict[Partition, int]:
        """The next offset to read of every partition this member holds."""

    def behind(self) -> dict[Partition, int]:
        """How many entries of every partition this member holds it has not read; as it was when a cluster that is away
        last answered.
        """

    def close(self) -> None:
        """Give the partitions back; what was read and not committed is read again by whoever takes them."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Log(Protocol):
    """A run's durable, replayable record of everything. Safe to use from several threads and processes."""

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        """Append all of it, in order, and return (partition, offset) of each. Durable on return.

        Raises TooLargeError, and appends nothing, where one value is above the size limit.
        """

    def subscribe(self, group: str, topics: Sequence[str]) -> Consumer:
        """Join a group: its members share the partitions, and start where the group last committed.

        A partition the group never committed starts at its beginning.
        """

    def assign(self, offsets: Offsets) -> Consumer:
        """Read exactly these partitions from these offsets, outside any group (the learner, tailing, replay)."""

    def begin_offsets(self, topic: str) -> dict[Partition, int]:
        """The oldest offset that is still there, per partition."""

    def end_offsets(self, topic: str) -> dict[Partition, int]:
        """The offset that the next record will get, per partition."""

    def committed(self, group: str, topics: Sequence[str]) -> dict[Partition, int]:
        """Where the group goes on after a restart (the beginning where it never committed)."""

    def newest(self, topic: str) -> dict[bytes, Entry]:
        """The newest record of every key of a compacted topic; of a key that was deleted, what came after that."""

    def trim(self, offsets: Offsets) -> None:
        """Forget everything before these offsets (retention)."""

    def close(self) -> None:
        """Release files and connections. Everything appended stays."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
