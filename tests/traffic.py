"""Records that flow through a log while its brokers fail, and an off-line check of what came of them.

Traffic.start -> (the test injects its fault) -> recovered -> stop -> Verdict

One thread appends small batches over several keys, numbered within each key, and notes what was acknowledged. Another,
a group of one member, reads and commits after every read. `judge` is values in, values out: what was acknowledged
minus what was read must be empty, and in a partition the records of a key stand in the order they were appended in.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

from streaming.config import KafkaConfig
from streaming.errors import LogError
from streaming.history import entries
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import Entry, Output

TOPIC = "prompts"
GROUP = "generators"
NUM_KEYS = 16
BATCH = 8
PAUSE_S = 0.01
"""Between two batches: some hundred records a second, so that tests of several minutes leave the cores to others."""

RECOVERY_S = 120.0
"""A broker that was killed serves again after 10 s, on a busy machine after several times as long."""

Item = tuple[bytes, int]
"""(key, number within the key)."""


class Verdict(NamedTuple):
    """What a fault did. Only `num_twice` may be more than nothing: delivery is at least once."""

    num_acknowledged: int
    lost: list[Item]  # acknowledged, and nobody read it
    missing: list[Item]  # acknowledged, and it does not lie in the log
    disordered: list[Item]  # behind a later one of its key
    num_twice: int  # in the log more than once
    refused: list[str]  # appends that failed: neither acknowledged nor known to be absent

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.missing or self.disordered or self.refused)


def judge(
    acknowledged: Iterable[Item], consumed: Iterable[Entry], stored: Iterable[Entry], refused: Iterable[str] = ()
) -> Verdict:
    """Compare what a writer was told with what a group read and with what lies in the log."""
    told = list(acknowledged)
    lying = list(stored)
    read, there = {item(entry) for entry in consumed}, Counter(item(entry) for entry in lying)
    newest: dict[bytes, int] = defaultdict(lambda: -1)
    seen: set[Item] = set()
    disordered = []
    for entry in sorted(lying, key=lambda entry: (entry.partition, entry.offset)):
        one = item(entry)
        if one not in seen and one[1] < newest[one[0]]:
            disordered.append(one)
        seen.add(one)
        newest[one[0]] = max(newest[one[0]], one[1])
    return Verdict(
        num_acknowledged=len(told),
        lost=[one for one in told if one not in read],
        missing=[one for one in told if one not in there],
        disordered=disordered,
        num_twice=sum(count - 1 for count in there.values()),
        refused=list(refused),
    )


def item(entry: Entry) -> Item:
    return entry.key, int(entry.value)


class Traffic:
    """Flows from `start` to `stop`; a context manager that stops it in any case."""

    def __init__(self, url: str, run: str, config: KafkaConfig) -> None:
        self._log = KafkaLog(url, run=run, max_record_bytes=2**20, config=config)
        self._stop_writing, self._stop_reading = threading.Event(), threading.Event()
        self._changed = threading.Condition()
        self.acknowledged: list[Item] = []
        self.consumed: list[Entry] = []
        self.refused: list[str] = []
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._write, self._read)]

    @property
    def num_acknowledged(self) -> int:
        return len(self.acknowledged)

    def recovered(self, num: int = 400) -> float:
        """Wait until `num` more records are acknowledged; the seconds until the first of them."""
        begun_s = time.monotonic()
        self._wait_for(self.num_acknowledged + 1)
        first_s = time.monotonic() - begun_s
        self._wait_for(self.num_acknowledged + num)
        return first_s

    def has_stopped_for(self, seconds: float) -> bool:
        """Whether nothing more is acknowledged for so long."""
        before = self.num_acknowledged
        with self._changed:
            return not self._changed.wait_for(lambda: self.num_acknowledged > before, seconds)

    def stop(self) -> Verdict:
        """End the writing, let the group read all of it, and judge."""
        self._stop_writing.set()
        self._threads[0].join(RECOVERY_S)
        told = set(self.acknowledged)
        with self._changed:
            self._changed.wait_for(lambda: told <= {item(entry) for entry in self.consumed}, RECOVERY_S)
        self._stop_reading.set()
        self._threads[1].join(RECOVERY_S)
        return judge(self.acknowledged, self.consumed, entries(self._log, TOPIC), self.refused)

    def _wait_for(self, num: int) -> None:
        with self._changed:
            enough = self._changed.wait_for(lambda: self.num_acknowledged >= num, RECOVERY_S)
        assert enough, f"{self.num_acknowledged} of {num} acknowledged after {RECOVERY_S} s; {self.refused}"

    def _write(self) -> None:
        number = 0
        while not self._stop_writing.wait(PAUSE_S):
            keys = [b"key-%d" % ((number + i) % NUM_KEYS) for i in range(BATCH)]
            items = [(key, (number + i) // NUM_KEYS) for i, key in enumerate(keys)]
            number += BATCH
            try:
                self._log.append([Output(TOPIC, key, b"%d" % value) for key, value in items])
            except LogError as error:
                self.refused.append(str(error))  # not known: it may lie in the log or not
                continue
            with self._changed:
                self.acknowledged += items
                self._changed.notify_all()

    def _read(self) -> None:
        with self._log.subscribe(GROUP, [TOPIC]) as consumer:
            while not self._stop_reading.is_set():
                found = consumer.read(max_records=512, timeout_s=0.2)
                if not found:
                    continue
                with self._changed:
                    self.consumed += found
                    self._changed.notify_all()
                consumer.commit({(entry.topic, entry.partition): entry.offset + 1 for entry in found})

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_writing.set()
        self._stop_reading.set()
        for thread in self._threads:
            thread.join(RECOVERY_S)
        self._log.close()
