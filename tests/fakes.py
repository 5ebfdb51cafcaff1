"""Small, honest stand-ins for what tests cannot have: a crash at an exact place, and time that passes when told to."""

from collections.abc import Iterable, Sequence

from streaming.log.protocol import Consumer, Entry, Log, Offsets, Output, Partition


class Crash(Exception):
    """The process ends here. Nothing of ours catches it."""


class CrashingLog(Log):
    """A real log that crashes once: before or behind the Nth append, or before or behind the Nth commit, from 1."""

    def __init__(
        self,
        log: Log,
        *,
        before_append: int | None = None,
        after_append: int | None = None,
        before_commit: int | None = None,
        after_commit: int | None = None,
    ) -> None:
        self.log = log
        self._places = {
            "before append": before_append,
            "after append": after_append,
            "before commit": before_commit,
            "after commit": after_commit,
        }
        self._counts = dict.fromkeys(self._places, 0)

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        self.pass_by("before append")
        places = self.log.append(outputs)
        self.pass_by("after append")
        return places

    def subscribe(self, group: str, topics: Sequence[str]) -> "CrashingConsumer":
        return CrashingConsumer(self, self.log.subscribe(group, topics))

    def assign(self, offsets: Offsets) -> Consumer:
        return self.log.assign(offsets)

    def begin_offsets(self, topic: str) -> dict[Partition, int]:
        return self.log.begin_offsets(topic)

    def end_offsets(self, topic: str) -> dict[Partition, int]:
        return self.log.end_offsets(topic)

    def committed(self, group: str, topics: Sequence[str]) -> dict[Partition, int]:
        return self.log.committed(group, topics)

    def newest(self, topic: str) -> dict[bytes, Entry]:
        return self.log.newest(topic)

    def trim(self, offsets: Offsets) -> None:
        self.log.trim(offsets)

    def close(self) -> None:
        self.log.close()

    def pass_by(self, place: str) -> None:
        """Crash if this is the time."""
        self._counts[place] += 1
        if self._counts[place] == self._places[place]:
            raise Crash(f"{place} {self._counts[place]}")


class CrashingConsumer(Consumer):
    """A real consumer whose commits may crash."""

    def __init__(self, log: CrashingLog, consumer: Consumer) -> None:
        self._log = log
        self._consumer = consumer

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        return self._consumer.read(max_records=max_records, timeout_s=timeout_s)

    def commit(self, offsets: Offsets) -> None:
        self._log.pass_by("before commit")
        self._consumer.commit(offsets)
        self._log.pass_by("after commit")

    def seek(self, offsets: Offsets) -> None:
        self._consumer.seek(offsets)

    def positions(self) -> dict[Partition, int]:
        return self._consumer.positions()

    def behind(self) -> dict[Partition, int]:
        return self._consumer.behind()

    def close(self) -> None:
        self._consumer.close()


class Clock:
    """Time that a test advances."""

    def __init__(self, now_s: float = 1_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
