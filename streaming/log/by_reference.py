"""A log whose records may be larger than a record: large values lie in `streaming/blobs.py`, the log names them.

    value above the limit -> blob (durable) -> reference appended -> read: blob fetched and checked -> value

Readers never see a reference, but where the blob is gone or damaged: then the entry's value is the reference, with
the problem in it, and `decode` refuses it, so that stages dead-letter it like any bytes that are no record.
"""

import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from streaming.blobs import BlobStore, Place
from streaming.errors import LogError, RecordError
from streaming.log.outlines import outline
from streaming.log.placing import refuse_too_large
from streaming.log.protocol import Consumer, Entry, Log, Offsets, Output, Partition
from streaming.log.sweeper import Sweeper
from streaming.metrics import Metrics
from streaming.wire import Reference, decode_reference, encode_reference

_READ_BYTES = 64 * 1024 * 1024
"""Of blobs that one read returns: what is beyond is read by the next one, so that memory stays bounded."""


def with_blobs(
    log: Log, url: str, *, run: str, max_record_bytes: int, max_blob_bytes: int, metrics: Metrics | None = None
) -> Log:
    """This log, with a run's blobs below `url`; the log itself where large values are refused (max_blob_bytes = 0)."""
    if not max_blob_bytes:
        return log
    blobs = BlobStore(f"{url}/{run}", count=_counter(metrics))
    return ByReferenceLog(log, blobs, max_record_bytes=max_record_bytes, max_blob_bytes=max_blob_bytes)


def unfetched(log: Log) -> Log:
    """The same log, whose large values stay references: for who needs their keys or outlines only."""
    return log.bare if isinstance(log, ByReferenceLog) else log


def missing_blob(log: Log, value: bytes) -> str | None:
    """Why these bytes could not be appended: the blob that they name is gone or cut. None for all others.

    It costs no download, so damage that leaves the size as it was shows only in `inlined`.
    """
    if not isinstance(log, ByReferenceLog):
        return None
    try:
        reference = decode_reference(value)
        if reference is not None:
            log.blobs.check(reference.location, reference.num_bytes)
    except RecordError as error:
        return f"{error.what} ({error.where})"
    return None


def inlined(log: Log, value: bytes) -> bytes:
    """The value that a reference names, as a dead letter holds one; all other bytes as they are.

    Raises RecordError where the blob is gone or damaged.
    """
    return log.inline(value) if isinstance(log, ByReferenceLog) else value


def _counter(metrics: Metrics | None) -> Callable[[str], None]:
    if metrics is None:
        return lambda action: None
    return lambda action: metrics.count("blobs_total", action=action)


class ByReferenceLog(Log):
    """Any log, and a store of blobs. Owns the log: closing this closes it."""

    def __init__(
        self,
        log: Log,
        blobs: BlobStore,
        *,
        max_record_bytes: int,
        max_blob_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`log` takes values up to `max_record_bytes`; the store takes those above, up to `max_blob_bytes`."""
        self.bare = log
        self.blobs = blobs
        self._max_record_bytes = max_record_bytes
        self._max_blob_bytes = max_blob_bytes
        self._sweeper = Sweeper(log, blobs, clock=clock)

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        """As the protocol says. Raises RecordError where a reference (of a dead letter) names a blob that is gone."""
        whole = [output._replace(value=self.inline(output.value)) for output in outputs]
        for output in whole:
            self._check_size(output)
        names = [self._write(output) for output in whole]
        places = self.bare.append([_refer(output, name) for output, name in zip(whole, names, strict=True)])
        self._place(names, places)
        self._sweeper.appended({output.topic for output in whole})
        return places

    def subscribe(self, group: str, topics: Sequence[str]) -> "ByReferenceConsumer":
        return ByReferenceConsumer(self.bare.subscribe(group, topics), self.blobs)

    def assign(self, offsets: Offsets) -> "ByReferenceConsumer":
        return ByReferenceConsumer(self.bare.assign(offsets), self.blobs)

    def begin_offsets(self, topic: str) -> dict[Partition, int]:
        return self.bare.begin_offsets(topic)

    def end_offsets(self, topic: str) -> dict[Partition, int]:
        return self.bare.end_offsets(topic)

    def committed(self, group: str, topics: Sequence[str]) -> dict[Partition, int]:
        return self.bare.committed(group, topics)

    def newest(self, topic: str) -> dict[bytes, Entry]:
        return {key: fetched(entry, self.blobs) for key, entry in self.bare.newest(topic).items()}

    def trim(self, offsets: Offsets) -> None:
        self.bare.trim(offsets)

    def inline(self, value: bytes) -> bytes:
        """The value that a reference names, as a dead letter holds one; all other bytes as they are.

        It is written anew when it is appended, so that the blob lives as long as its newest record. Raises
        RecordError where the blob is gone or damaged.
        """
        reference = decode_reference(value)
        return value if reference is None else self.blobs.read(reference.location, reference.num_bytes)

    def close(self) -> None:
        self._sweeper.close()
        self.bare.close()

    def _check_size(self, output: Output) -> None:
        limit = max(self._max_record_bytes, self._max_blob_bytes)
        refuse_too_large(output, limit, setting="log.max_blob_bytes")

    def _write(self, output: Output) -> str | None:
        """The name of the value's blob, which is durable; None where it needs none."""
        if len(output.value) <= self._max_record_bytes:
            return None
        return self.blobs.write(output.topic, output.value)

    def _place(self, names: Sequence[str | None], places: Sequence[tuple[int, int]]) -> None:
        for name, place in zip(names, places, strict=True):
            if name is not None:
                try:
                    self.blobs.place(name, Place(*place))
                except LogError:
                    # The record is in the log, so the append has not failed. The sweeper goes by the blob's age.
                    self.blobs.count("unplaced")


def _refer(output: Output, name: str | None) -> Output:
    if name is None:
        return output
    reference = Reference(
        location=name,
        num_bytes=len(output.value),
        outline=outline(output.topic, output.value),
    )
    return output._replace(value=encode_reference(reference))


class ByReferenceConsumer(Consumer):
    """A position in the log; what it reads is whole."""

    def __init__(self, consumer: Consumer, blobs: BlobStore) -> None:
        self._consumer = consumer
        self._blobs = blobs

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        """As the protocol says; fewer entries where their values are large.

        Raises LogError where the blobs' store does not answer; the position stays before what was not returned.
        """
        entries = self._consumer.read(max_records=max_records, timeout_s=timeout_s)
        found: list[Entry] = []
        num_bytes = 0
        try:
            for entry in entries:
                if num_bytes >= _READ_BYTES:
                    break
                found.append(fetched(entry, self._blobs))
                num_bytes += len(found[-1].value) if found[-1] is not entry else 0
        except LogError:
            self._go_back(entries)
            raise
        self._go_back(entries[len(found) :])
        return found

    def commit(self, offsets: Offsets) -> None:
        self._consumer.commit(offsets)

    def seek(self, offsets: Offsets) -> None:
        self._consumer.seek(offsets)

    def positions(self) -> dict[Partition, int]:
        return self._consumer.positions()

    def behind(self) -> dict[Partition, int]:
        return self._consumer.behind()

    def close(self) -> None:
        self._consumer.close()

    def _go_back(self, entries: Sequence[Entry]) -> None:
        """Read these again next time."""
        first: dict[Partition, int] = {}
        for entry in entries:
            first.setdefault((entry.topic, entry.partition), entry.offset)
        if first:
            self._consumer.seek(first)


def fetched(entry: Entry, blobs: BlobStore) -> Entry:
    """The entry with its value; with a reference that says why where the value is gone. Raises LogError."""
    try:
        reference = decode_reference(entry.value, where=entry.where)
    except RecordError:
        return entry
    if reference is None:
        return entry
    try:
        return entry._replace(value=blobs.read(reference.location, reference.num_bytes))
    except RecordError as error:
        blobs.count("unreadable")
        problem = f"{error.what} ({error.where})"
        return entry._replace(value=encode_reference(msgspec.structs.replace(reference, problem=problem)))
