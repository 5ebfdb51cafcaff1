"""The log against bare apsw: the same records, grouped the same, both tuned, turn by turn in one run.

The peer is what one would write without a log: one table, one transaction a group, one SELECT a batch, on a file with
the same journal, sync, checkpoints and cache. The log adds partitions, offsets, checks, group commit and wake-ups.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw

from streaming.log.protocol import Output
from streaming.log.sqlite import SQLiteLog
from tests.bench.machine import machine

GOAL = 0.5
"""At least half of bare apsw's rate."""

NUM_BYTES = 4096
"""About a group of eight short candidates."""

BATCH = 64
TURN_S = 0.4
NUM_TURNS = 9
"""Odd, so that the median is a turn. A turn is long enough for a few hundred syncs."""

VALUE = bytes(range(256)) * (NUM_BYTES // 256)
TOPIC = "candidates"


class Ours:
    """The log, through its public functions."""

    def __init__(self, folder: Path) -> None:
        self.log = SQLiteLog(folder / "ours.db", run="bench", max_record_bytes=2**20, max_bytes=2**40)
        self._num = 0

    def append(self, num: int) -> int:
        first, self._num = self._num, self._num + num
        self.log.append([Output(TOPIC, b"%016x" % i, VALUE) for i in range(first, first + num)])
        return num

    def read_all(self) -> int:
        num = 0
        with self.log.assign(self.log.begin_offsets(TOPIC)) as reader:
            while entries := reader.read(max_records=BATCH, timeout_s=0):
                num += len(entries)
        return num


class Peer:
    """Bare apsw."""

    def __init__(self, folder: Path) -> None:
        self._connection = apsw.Connection(str(folder / "peer.db"))
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 4096", "cache_size = -8192"):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        self._connection.execute("CREATE TABLE records (id INTEGER PRIMARY KEY, time_s REAL, key BLOB, value BLOB)")
        self._num = 0

    def append(self, num: int) -> int:
        first, self._num = self._num, self._num + num
        rows = [(time.time(), b"%016x" % i, VALUE) for i in range(first, first + num)]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT INTO records (time_s, key, value) VALUES (?, ?, ?)", rows)
        self._connection.execute("COMMIT")
        return num

    def read_all(self) -> int:
        num, position = 0, 0
        select = "SELECT id, time_s, key, value FROM records WHERE id > ? ORDER BY id LIMIT ?"
        while rows := self._connection.execute(select, (position, BATCH)).fetchall():
            num += len(rows)
            position = rows[-1][0]
        return num


def run() -> list[dict[str, Any]]:
    """Measure everything; takes about half a minute."""
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = Ours(Path(folder)), Peer(Path(folder))
        rows = [
            compare("log: append, one record a call", lambda: ours.append(1), lambda: peer.append(1)),
            compare(f"log: append, {BATCH} records a call", lambda: ours.append(BATCH), lambda: peer.append(BATCH)),
            compare(f"log: read, {BATCH} records a call", ours.read_all, peer.read_all),
        ]
        ours.log.close()
    return rows


def compare(name: str, ours: Callable[[], int], peer: Callable[[], int]) -> dict[str, Any]:
    """Rates in turns, so that a busy moment of the machine hits both; the ratio is the median of the turns' ratios."""
    rate(ours), rate(peer)  # both warm
    turns = [(rate(ours), rate(peer)) for _ in range(NUM_TURNS)]
    ratio = statistics.median(mine / theirs for mine, theirs in turns)
    return {
        "name": name,
        "ours": round(statistics.median(mine for mine, _ in turns)),
        "peer": round(statistics.median(theirs for _, theirs in turns)),
        "ratio": round(ratio, 2),
        "goal": f"> {GOAL}",
        "holds": ratio > GOAL,
        "unit": f"records/s of {NUM_BYTES // 1024} KiB",
        "machine": machine(),
    }


def rate(work: Callable[[], int]) -> float:
    """Records a second over one turn."""
    begun_s, num = time.perf_counter(), 0
    while time.perf_counter() - begun_s < TURN_S:
        num += work()
    return num / (time.perf_counter() - begun_s)
