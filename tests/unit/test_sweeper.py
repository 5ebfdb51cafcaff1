import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming import topics
from streaming.blobs import BlobStore
from streaming.log.by_reference import ByReferenceLog
from streaming.log.protocol import Output
from streaming.log.sqlite import SQLiteLog
from streaming.log.sweeper import MAX_REMOVED, SWEEP_S, Sweeper
from tests.fakes import Clock

LARGE = b"large" * 1000


@pytest.fixture
def clock() -> Clock:
    return Clock(time.time())  # files have the machine's time


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> Iterator[ByReferenceLog]:
    bare = SQLiteLog(tmp_path / "log.db", run="test", max_record_bytes=1024, max_bytes=2**30, clock=clock)
    store = BlobStore(str(tmp_path / "blobs"))
    with ByReferenceLog(bare, store, max_record_bytes=1024, max_blob_bytes=2**20, clock=clock) as log:
        yield log


def append(log: ByReferenceLog, value: bytes) -> None:
    log.append([Output("candidates", b"key", value)])


def wait_for_sweep() -> None:
    for thread in threading.enumerate():
        if thread.name == "blob-sweep":
            thread.join()


def num_files(folder: Path) -> int:
    return sum(".at-" not in path.name for path in (folder / "blobs").glob("*/*"))


def test_blobs_go_by_themselves_when_their_topics_retention_has_passed(
    log: ByReferenceLog, clock: Clock, tmp_path: Path
) -> None:
    append(log, LARGE)
    clock.advance(topics.CANDIDATES.retention_s or 0)
    append(log, LARGE + b"2")
    assert num_files(tmp_path) == 2
    clock.advance(SWEEP_S + 1)
    append(log, b"the log forgets the first, and its blob goes")
    wait_for_sweep()
    assert num_files(tmp_path) == 1


def test_a_young_topic_is_not_even_listed(log: ByReferenceLog, clock: Clock, tmp_path: Path) -> None:
    append(log, LARGE)
    clock.advance(SWEEP_S - 1)
    append(log, b"too early")
    wait_for_sweep()
    assert num_files(tmp_path) == 1


def test_one_sweep_removes_the_oldest_blobs(tmp_path: Path, log: ByReferenceLog, clock: Clock) -> None:
    """It took whichever the listing named first."""
    (folder := tmp_path / "blobs" / "candidates").mkdir(parents=True)
    for age_s in random.Random(0).sample(range(MAX_REMOVED + 1), MAX_REMOVED + 1):
        path = folder / f"{age_s:064x}"
        path.touch()
        os.utime(path, (0, 1_000_000 - age_s))
    assert Sweeper(log, log.blobs, clock=clock).sweep("candidates") == MAX_REMOVED
    assert [path.name for path in folder.iterdir()] == [f"{0:064x}"]


def test_a_sweep_that_fails_is_counted_and_costs_no_append(tmp_path: Path, clock: Clock) -> None:
    counted: list[str] = []
    bare = SQLiteLog(tmp_path / "log.db", run="test", max_record_bytes=1024, max_bytes=2**30, clock=clock)
    (tmp_path / "blobs").write_bytes(b"in the way")
    store = BlobStore(str(tmp_path / "blobs" / "x"), count=counted.append, wait=lambda _: None)
    with ByReferenceLog(bare, store, max_record_bytes=1024, max_blob_bytes=2**20, clock=clock) as log:
        append(log, b"first")
        clock.advance(SWEEP_S + 1)
        append(log, b"second")
        wait_for_sweep()
    assert counted[-1] == "sweep_failed"
