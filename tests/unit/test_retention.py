"""The embedded log forgets by age and by size, the oldest first, and keeps compacted topics."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from streaming import topics
from streaming.log.protocol import Output
from streaming.log.sqlite import SQLiteLog
from tests.fakes import Clock

MAX_BYTES = 2**20


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> Iterator[SQLiteLog]:
    with SQLiteLog(tmp_path / "log.db", run="test", max_record_bytes=2**20, max_bytes=MAX_BYTES, clock=clock) as opened:
        yield opened


def append(log: SQLiteLog, topic: str, num: int, *, value: bytes = b"v") -> None:
    log.append([Output(topic, b"%d" % i, value) for i in range(num)])


def num_left(log: SQLiteLog, topic: str) -> int:
    begins = log.begin_offsets(topic)
    return sum(end - begins[place] for place, end in log.end_offsets(topic).items())


def test_what_is_older_than_its_topics_retention_goes(log: SQLiteLog, clock: Clock) -> None:
    append(log, "prompts", 100)
    clock.advance(topics.DAY_S)
    append(log, "prompts", 10)
    clock.advance(6 * topics.DAY_S + 1)
    append(log, "prompts", 1)
    assert num_left(log, "prompts") == 11
    with log.assign(log.begin_offsets("prompts")) as reader:
        assert len(reader.read(max_records=99, timeout_s=0)) == 11


@pytest.mark.fault("clock jump", backend="sqlite")
def test_age_takes_nothing_that_a_group_has_still_to_read(log: SQLiteLog, clock: Clock) -> None:
    """A run that was stopped over a long weekend forgot the groups that nobody had scored yet, and could not go on."""
    append(log, "candidates", 40)
    with log.subscribe("scorer", ["candidates"]) as slow, log.subscribe("other", ["candidates"]) as quick:
        for consumer, num in ((slow, 30), (quick, 40)):
            while num > 0:
                num -= len(consumer.read(max_records=min(num, 7), timeout_s=0))
            consumer.commit(consumer.positions())
        clock.advance(3 * topics.DAY_S)
        append(log, "candidates", 1)
        assert num_left(log, "candidates") == 11
        append(log, "candidates", 1)
        assert sum(len(slow.read(max_records=99, timeout_s=0)) for _ in range(3)) == 12


@pytest.mark.fault("clock jump", backend="sqlite")
def test_a_clock_that_goes_back_puts_no_look_off(log: SQLiteLog, clock: Clock) -> None:
    append(log, "prompts", 100)
    clock.advance(-topics.DAY_S)
    append(log, "candidates", 10)
    clock.advance(2 * topics.DAY_S + 60)  # half of that it had lost
    append(log, "prompts", 1)
    assert num_left(log, "candidates") == 0
    assert num_left(log, "prompts") == 101


def test_topics_without_an_age_and_compacted_topics_do_not_age(log: SQLiteLog, clock: Clock) -> None:
    append(log, "unknown", 5)
    append(log, "roles", 5)
    clock.advance(1000 * topics.DAY_S)
    append(log, "unknown", 1)
    assert num_left(log, "unknown") == 6
    assert len(log.newest("roles")) == 5


def test_the_file_stays_near_its_limit_and_the_newest_stay(log: SQLiteLog, clock: Clock, tmp_path: Path) -> None:
    append(log, "roles", 5)
    for _ in range(100):
        clock.advance(1)
        append(log, "prompts", 10, value=b"x" * 4000)
    kept = num_left(log, "prompts")
    assert 0.6 * MAX_BYTES / 4000 < kept < MAX_BYTES / 4000
    assert (tmp_path / "log.db").stat().st_size < 1.5 * MAX_BYTES
    assert len(log.newest("roles")) == 5
    with log.assign(log.begin_offsets("prompts")) as reader:
        assert min(entry.time_s for entry in reader.read(max_records=1000, timeout_s=0)) > clock() - 30


def test_the_oldest_records_of_all_topics_go_first(log: SQLiteLog, clock: Clock) -> None:
    append(log, "old", 50, value=b"x" * 4000)
    clock.advance(60)
    for _ in range(30):
        append(log, "young", 5, value=b"x" * 4000)
        clock.advance(1)
    append(log, "young", 60, value=b"x" * 4000)
    assert num_left(log, "old") < 20
    assert num_left(log, "young") == 210


def test_another_runs_records_are_left_alone(log: SQLiteLog, clock: Clock, tmp_path: Path) -> None:
    with SQLiteLog(tmp_path / "log.db", run="other", max_record_bytes=2**20, max_bytes=2**30, clock=clock) as other:
        append(other, "prompts", 300, value=b"x" * 4000)
        append(log, "prompts", 20, value=b"x" * 4000)
        assert num_left(other, "prompts") == 300
        assert num_left(log, "prompts") == 0
