"""What every backend of the log promises (`streaming/log/protocol.py`), with other processes and their deaths."""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from kafka import KafkaAdminClient, KafkaProducer

from streaming.errors import LeaseLostError, LogError, TooLargeError, TrimmedError
from streaming.log.protocol import Consumer, Entry, Log, Output, Partition
from streaming.records import encode
from tests.builders import make_role
from tests.fakes import Crash, CrashingLog
from tests.kafka_cluster import Address
from tests.log_process import LONG_LEASE_S, SHORT_LEASE_S, LogProcess, open_test_log

IN = ("in", 0)
"""A topic that is in no table: it has one partition. "prompts" has four; "roles" is compacted and has one."""


class Backend(Protocol):
    """Opens logs of one store that was empty before the test, in this process and in others."""

    short_lease_s: float

    def open(self, run: str = "test", *, lease_s: float = LONG_LEASE_S) -> Log: ...

    def process(self, verb: str, *arguments: str, lease_s: float = LONG_LEASE_S) -> LogProcess: ...

    def delete(self, topic: str, key: bytes) -> None:
        """Delete a key's newest record of a compacted topic, from outside, as this backend lets people do it."""

    def close(self) -> None: ...


class SQLiteBackend:
    """Logs of one file."""

    short_lease_s = SHORT_LEASE_S

    def __init__(self, folder: Path) -> None:
        self._url = f"sqlite:///{folder}/log.db"
        self._opened: list[Log] = []

    def open(self, run: str = "test", *, lease_s: float = LONG_LEASE_S) -> Log:
        self._opened.append(open_test_log(self._url, run, lease_s=lease_s))
        return self._opened[-1]

    def process(self, verb: str, *arguments: str, lease_s: float = LONG_LEASE_S) -> LogProcess:
        return LogProcess(self._url, verb, *arguments, lease_s=lease_s)

    def delete(self, topic: str, key: bytes) -> None:
        found = self._opened[-1].newest(topic)[key]  # the oldest that is there, so that the trim takes nothing else
        self._opened[-1].trim({(topic, found.partition): found.offset + 1})

    def close(self) -> None:
        for log in self._opened:
            log.close()


class KafkaBackend:
    """Logs of one broker that serves all tests: every test has runs of its own, and so topics and groups."""

    short_lease_s = 6.0 if "KAFKA_BOOTSTRAP" in os.environ else 2.0  # a broker's group.min.session.timeout.ms
    _numbers = itertools.count()

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._prefix = f"contract-{os.getpid()}-{next(self._numbers)}"
        self._opened: list[Log] = []
        self._made: set[str] = set()

    def open(self, run: str = "test", *, lease_s: float = LONG_LEASE_S) -> Log:
        self._make_topics(run)
        self._opened.append(open_test_log(self._url, self._name(run), lease_s=lease_s))
        return self._opened[-1]

    def process(self, verb: str, *arguments: str, lease_s: float = LONG_LEASE_S) -> LogProcess:
        self._make_topics("test")
        return LogProcess(self._url, verb, *arguments, run=self._name("test"), lease_s=lease_s)

    def delete(self, topic: str, key: bytes) -> None:
        with KafkaProducer(bootstrap_servers=self._bootstrap) as producer:
            producer.send(f"{self._name('test')}.{topic}", key=key, value=None, partition=0).get(timeout=60)

    def close(self) -> None:
        for log in self._opened:
            log.close()

    @property
    def _url(self) -> str:
        return f"kafka://{self._bootstrap}"

    def _name(self, run: str) -> str:
        return f"{self._prefix}-{run}"

    def _make_topics(self, run: str) -> None:
        if run in self._made:
            return
        self._made.add(run)
        partitions = {"in": 1, "out": 1, "prompts": 4, "roles": 1}
        topics = {f"{self._name(run)}.{name}": {"num_partitions": num} for name, num in partitions.items()}
        topics[f"{self._name(run)}.roles"]["configs"] = {"cleanup.policy": "compact"}
        with KafkaAdminClient(bootstrap_servers=self._bootstrap) as admin:
            admin.create_topics(topics)
            admin.wait_for_topics(list(topics))


@pytest.fixture(params=["sqlite", "kafka"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """Every backend in turn, empty."""
    if request.param == "sqlite":
        backend: Backend = SQLiteBackend(tmp_path)
    else:
        kafka: Address = request.getfixturevalue("kafka")
        backend = KafkaBackend(kafka.bootstrap)
    yield backend
    backend.close()


@pytest.fixture
def log(backend: Backend) -> Log:
    return backend.open()


def fill(log: Log, num: int, topic: str = "in", first: int = 0) -> None:
    log.append([Output(topic, b"%d" % i, b"%d" % i) for i in range(first, first + num)])


def drain(consumer: Consumer, timeout_s: float = 0) -> list[Entry]:
    """Everything there is now."""
    found = []
    while entries := consumer.read(max_records=100, timeout_s=timeout_s):
        found += entries
    return found


def take(consumer: Consumer, num: int) -> list[Entry]:
    """So many entries, and nothing more: a member of a group waits until it has joined."""
    found: list[Entry] = []
    while len(found) < num:
        found += (entries := consumer.read(max_records=num - len(found), timeout_s=60))
        assert entries, f"{len(found)} of {num} in a minute"
    assert consumer.read(max_records=100, timeout_s=0) == []
    return found


def share(*members: Consumer) -> None:
    """Let the members of a group read nothing until each holds its share."""

    def is_shared() -> bool:
        assert [entry for member in members for entry in member.read(max_records=1, timeout_s=0)] == []
        held = [len(member.positions()) for member in members]
        return sum(held) == 4 and max(held) - min(held) <= 1

    wait_until(is_shared)


def everything(log: Log, topic: str) -> list[Entry]:
    with log.assign(log.begin_offsets(topic)) as reader:
        return drain(reader)


def numbers(entries: list[Entry]) -> list[int]:
    return sorted(int(entry.value) for entry in entries)


def behind(entries: list[Entry]) -> dict[Partition, int]:
    """What to commit when these are done."""
    return {(entry.topic, entry.partition): entry.offset + 1 for entry in entries}


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """For what another process does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen"
        threading.Event().wait(0.01)


# Appending


def test_records_of_a_key_lie_in_one_partition_in_the_order_of_their_appends(log: Log) -> None:
    for i in range(30):
        log.append([Output("prompts", b"key%d" % (i % 5), b"%d" % i), Output("prompts", b"other%d" % i, b"0")])
    for key in {b"key%d" % i for i in range(5)}:
        mine = [entry for entry in everything(log, "prompts") if entry.key == key]
        assert len({entry.partition for entry in mine}) == 1
        assert [int(entry.value) for entry in mine] == sorted(int(entry.value) for entry in mine)


def test_keys_spread_over_all_partitions(log: Log) -> None:
    fill(log, 100, "prompts")
    assert min(log.end_offsets("prompts").values()) > 10
    assert len(log.end_offsets("prompts")) == 4


def test_append_says_where_each_record_lies(log: Log) -> None:
    outputs = [Output("prompts", b"%d" % i, b"%d" % i) for i in range(20)]
    places = log.append(outputs[:10]) + log.append(outputs[10:])
    found = {(entry.partition, entry.offset): entry.value for entry in everything(log, "prompts")}
    assert [found[place] for place in places] == [output.value for output in outputs]


def test_offsets_of_a_partition_are_dense_from_zero(log: Log) -> None:
    for _ in range(5):
        fill(log, 3)
    assert [entry.offset for entry in everything(log, "in")] == list(range(15))
    assert log.end_offsets("in") == {IN: 15}


def test_any_bytes_come_back_as_they_were(log: Log) -> None:
    pairs = [(b"", b""), (b"\x00", b"\x00\xff"), ("ä".encode(), b"{}"), (b"key", b"\n" * 1000)]
    log.append([Output("in", key, value) for key, value in pairs])
    assert [(entry.key, entry.value) for entry in everything(log, "in")] == pairs


def test_the_same_record_twice_is_two_records(log: Log) -> None:
    assert log.append([Output("in", b"k", b"v")] * 2) == [(0, 0), (0, 1)]


def test_nothing_appended_is_nothing_written(log: Log) -> None:
    assert log.append([]) == []
    assert log.end_offsets("in") == {IN: 0}


def test_one_record_above_the_size_limit_refuses_the_whole_append(log: Log) -> None:
    with pytest.raises(TooLargeError, match=str(2**20 + 1)):
        log.append([Output("in", b"k", b"small"), Output("in", b"k", b"x" * (2**20 + 1))])
    assert everything(log, "in") == []
    assert log.append([Output("in", b"k", b"x" * 2**20)]) == [(0, 0)]


def test_threads_append_at_once_and_none_loses_a_record(log: Log) -> None:
    def work(prefix: int) -> None:
        for i in range(50):
            log.append([Output("prompts", b"%d" % prefix, b"%d" % (1000 * prefix + i))])

    threads = [threading.Thread(target=work, args=[prefix]) for prefix in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = everything(log, "prompts")
    for prefix in range(8):
        assert [int(e.value) - 1000 * prefix for e in found if e.key == b"%d" % prefix] == list(range(50))


def test_processes_append_at_once_and_none_loses_a_record(backend: Backend) -> None:
    prefixes = ("a", "b", "c")
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(backend.process("append", "prompts", prefix, "60")) for prefix in prefixes]
        told = {line for process in processes for line in process.rest()}
    found = everything(backend.open(), "prompts")
    assert {(entry.partition, entry.offset, entry.value.decode()) for entry in found} == told
    assert sorted(entry.value.decode() for entry in found) == sorted(f"{p}{i}" for p in prefixes for i in range(60))


@pytest.mark.fault("kill: writer or member of a log")
def test_what_was_acknowledged_survives_a_kill_at_any_moment(backend: Backend) -> None:
    with backend.process("append", "in", "x", "100000") as process:
        told = process.lines(40)
        process.kill()
    found = [(entry.partition, entry.offset, entry.value.decode()) for entry in everything(backend.open(), "in")]
    assert found[:40] == told
    assert [value for _, _, value in found] == [f"x{i}" for i in range(len(found))]


def test_another_process_sees_what_was_acknowledged(backend: Backend, log: Log) -> None:
    fill(log, 3)
    with backend.process("hold", "g", "in") as process:
        assert process.lines(3) == [(0, i, str(i)) for i in range(3)]


# Reading


def test_a_read_returns_at_most_what_was_asked_for(log: Log) -> None:
    fill(log, 10, "prompts")
    with log.assign(log.begin_offsets("prompts")) as reader:
        assert [len(reader.read(max_records=4, timeout_s=0)) for _ in range(4)] == [4, 4, 2, 0]


def test_a_full_partition_does_not_hold_up_the_others(log: Log) -> None:
    fill(log, 400, "prompts")
    with log.assign(log.begin_offsets("prompts")) as reader:
        assert {reader.read(max_records=1, timeout_s=0)[0].partition for _ in range(4)} == {0, 1, 2, 3}


def test_a_read_waits_for_an_append_of_this_process(log: Log) -> None:
    with log.assign({IN: 0}) as reader:
        thread = threading.Thread(target=fill, args=[log, 1])
        thread.start()
        assert len(reader.read(max_records=9, timeout_s=30)) == 1
        thread.join()


def test_a_read_waits_for_an_append_of_another_process(backend: Backend, log: Log) -> None:
    with log.assign({IN: 0}) as reader, backend.process("append", "in", "x", "1"):
        assert [entry.value for entry in reader.read(max_records=9, timeout_s=30)] == [b"x0"]


def test_a_read_of_nothing_is_empty_when_its_time_is_up(log: Log) -> None:
    with log.assign({IN: 0}) as reader:
        assert reader.read(max_records=9, timeout_s=0.01) == []


def test_assign_reads_from_exactly_these_offsets(log: Log) -> None:
    fill(log, 20, "prompts")
    ends = log.end_offsets("prompts")
    with log.assign({("prompts", 0): 2, ("prompts", 3): 1}) as reader:
        read = drain(reader)
        assert {entry.partition: entry.offset for entry in reversed(read)} == {0: 2, 3: 1}
        assert reader.positions() == {place: ends[place] for place in [("prompts", 0), ("prompts", 3)]}


def test_a_reader_knows_how_much_of_what_it_holds_it_has_not_read(log: Log) -> None:
    fill(log, 20, "prompts")
    ends = log.end_offsets("prompts")
    with log.assign({("prompts", 0): 0, ("prompts", 3): 1}) as reader:
        assert reader.behind() == {("prompts", 0): ends["prompts", 0], ("prompts", 3): ends["prompts", 3] - 1}
        num_read = len(reader.read(max_records=3, timeout_s=30))
        assert sum(reader.behind().values()) == ends["prompts", 0] + ends["prompts", 3] - 1 - num_read
        drain(reader)
        assert set(reader.behind().values()) == {0}
        fill(log, 20, "prompts")
        assert reader.behind() == {place: ends[place] for place in reader.positions()}, "the same keys once more"


def test_seek_reads_on_from_there_backwards_and_forwards(log: Log) -> None:
    fill(log, 10)
    with log.assign({IN: 0}) as reader:
        for position, expected in [(7, [7, 8, 9]), (0, list(range(10))), (10, []), (9, [9])]:
            reader.seek({IN: position})
            assert reader.positions() == {IN: position}
            assert numbers(drain(reader)) == expected


def test_an_offset_beyond_the_end_is_an_error_and_not_a_wait(log: Log) -> None:
    fill(log, 3)
    with pytest.raises(LogError, match="beyond"):
        log.assign({IN: 4}).read(max_records=1, timeout_s=0)


def test_a_partition_that_does_not_exist_is_an_error(log: Log) -> None:
    with pytest.raises(LogError):
        log.assign({("in", 1): 0})
    with pytest.raises(LogError):
        log.trim({("in", 1): 0})


def test_a_reader_without_a_group_cannot_commit(log: Log) -> None:
    with log.assign({IN: 0}) as reader, pytest.raises(LogError):
        reader.commit({IN: 0})


# Groups


def test_a_group_goes_on_where_it_committed(backend: Backend, log: Log) -> None:
    fill(log, 10)
    with log.subscribe("g", ["in"]) as consumer:
        consumer.commit(behind(consumer.read(max_records=4, timeout_s=60)))
        assert len(consumer.read(max_records=3, timeout_s=60)) == 3  # read, never committed
    log.close()
    with backend.open() as later, later.subscribe("g", ["in"]) as consumer:
        assert later.committed("g", ["in"]) == {IN: 4}
        assert numbers(take(consumer, 6)) == [4, 5, 6, 7, 8, 9]


@pytest.mark.fault("kill: between append and commit")
def test_a_crash_between_append_and_commit_repeats_the_batch(log: Log) -> None:
    fill(log, 3)
    crashing = CrashingLog(log, before_commit=1)
    with pytest.raises(Crash), crashing.subscribe("g", ["in"]) as consumer:
        entries = consumer.read(max_records=9, timeout_s=60)
        log.append([Output("out", entry.key, entry.value) for entry in entries])
        consumer.commit(behind(entries))
    with log.subscribe("g", ["in"]) as consumer:
        assert numbers(take(consumer, 3)) == [0, 1, 2]
    assert numbers(everything(log, "out")) == [0, 1, 2]


def test_groups_do_not_disturb_each_other(log: Log) -> None:
    fill(log, 3)
    with log.subscribe("g", ["in"]) as one, log.subscribe("h", ["in"]) as other:
        one.commit(behind(take(one, 3)))
        assert numbers(take(other, 3)) == [0, 1, 2]
    assert log.committed("h", ["in"]) == {IN: 0}


def test_a_group_reads_several_topics(log: Log) -> None:
    with log.subscribe("g", ["in", "prompts"]) as consumer:
        fill(log, 3, "in")
        fill(log, 9, "prompts", first=3)
        assert numbers(take(consumer, 12)) == list(range(12))


def test_members_share_partitions_and_no_entry_is_read_twice(backend: Backend, log: Log) -> None:
    with log.subscribe("g", ["prompts"]) as one, backend.open().subscribe("g", ["prompts"]) as other:
        share(one, other)
        assert len(one.positions()) == len(other.positions()) == 2
        fill(log, 40, "prompts")
        assert numbers(drain(one) + drain(other)) == list(range(40))


def test_a_member_that_leaves_hands_over_at_once_and_only_what_was_not_committed(log: Log) -> None:
    fill(log, 40, "prompts")
    with log.subscribe("g", ["prompts"]) as one:
        done = one.read(max_records=15, timeout_s=60)
        one.commit(behind(done))
        take(one, 40 - len(done))
    with log.subscribe("g", ["prompts"]) as other:
        assert numbers(take(other, 40 - len(done))) == sorted(set(range(40)) - set(numbers(done)))


def test_a_commit_of_a_partition_that_moved_is_refused_whole(log: Log) -> None:
    with log.subscribe("g", ["prompts"]) as one, log.subscribe("g", ["prompts"]) as other:
        share(one, other)
        fill(log, 40, "prompts")
        read = drain(one)
        kept = set(one.positions())
        assert {(entry.topic, entry.partition) for entry in read} == kept != set(log.end_offsets("prompts"))
        with pytest.raises(LeaseLostError):
            one.commit(log.end_offsets("prompts"))
        assert set(log.committed("g", ["prompts"]).values()) == {0}
        one.commit(behind(read))
        assert {place for place, offset in log.committed("g", ["prompts"]).items() if offset > 0} == kept


def test_what_was_read_of_a_partition_that_moved_since_cannot_be_committed(log: Log) -> None:
    fill(log, 40, "prompts")
    with log.subscribe("g", ["prompts"]) as one:
        read = take(one, 40)
        with log.subscribe("g", ["prompts"]) as other:
            wait_until(lambda: one.read(max_records=9, timeout_s=0) + other.read(max_records=1, timeout_s=0) != [])
            with pytest.raises(LeaseLostError):
                one.commit(behind(read))
            kept = {place: offset for place, offset in behind(read).items() if place in one.positions()}
            one.commit(kept)
            committed = log.committed("g", ["prompts"])
            assert {place: offset for place, offset in committed.items() if offset} == kept


def test_a_member_stays_where_it_is_in_what_it_keeps_when_another_joins(log: Log) -> None:
    fill(log, 40, "prompts")
    with log.subscribe("g", ["prompts"]) as one:
        read = take(one, 40)
        with log.subscribe("g", ["prompts"]) as other:
            again: list[Entry] = []

            def has_taken_its_share() -> bool:
                assert one.read(max_records=99, timeout_s=0) == []
                again.extend(other.read(max_records=99, timeout_s=0))
                return len(other.positions()) == 2

            wait_until(has_taken_its_share)
            again += drain(other)
            moved = set(other.positions())
            assert numbers(again) == numbers([e for e in read if (e.topic, e.partition) in moved])


@pytest.mark.fault("kill: writer or member of a log")
def test_a_killed_members_partitions_move_to_another(backend: Backend) -> None:
    log = backend.open(lease_s=backend.short_lease_s)
    fill(log, 20, "prompts")
    with backend.process("hold", "g", "prompts", lease_s=backend.short_lease_s) as process:
        held = process.lines(20)
        with log.subscribe("g", ["prompts"]) as consumer:
            assert drain(consumer) == []  # the other one lives, and has given nothing up
            process.kill()
            found: list[Entry] = []
            while len(found) < len(held):
                found += consumer.read(max_records=99, timeout_s=0.1)
            assert numbers(found) == list(range(20))


def test_a_busy_member_keeps_its_lease_while_it_reads_nothing(backend: Backend) -> None:
    log = backend.open(lease_s=backend.short_lease_s)
    fill(log, 20, "prompts")
    with log.subscribe("g", ["prompts"]) as consumer:
        read = take(consumer, 20)
        with backend.open(lease_s=backend.short_lease_s).subscribe("g", ["prompts"]) as other:
            assert other.read(max_records=1, timeout_s=1.5 * backend.short_lease_s) == []  # for longer than a lease
        consumer.commit(behind(read))


def test_a_member_that_turns_busy_while_another_joins_keeps_its_share(backend: Backend) -> None:
    """Its last read ended in the middle of the rebalance: it used to be taken for dead in the step that followed."""
    log = backend.open(lease_s=backend.short_lease_s)
    fill(log, 20, "prompts")
    with log.subscribe("g", ["prompts"]) as one:
        read = take(one, 20)
        with backend.open(lease_s=backend.short_lease_s).subscribe("g", ["prompts"]) as other:
            other.read(max_records=1, timeout_s=1)  # asks for its share
            for _ in range(30):
                assert one.read(max_records=1, timeout_s=0) == []
                threading.Event().wait(0.05)
            busy_until_s = time.monotonic() + 1.5 * backend.short_lease_s
            while time.monotonic() < busy_until_s:
                other.read(max_records=99, timeout_s=0.1)
            kept = {place: offset for place, offset in behind(read).items() if place in one.positions()}
            assert len(kept) >= 2
            one.commit(kept)
            committed = log.committed("g", ["prompts"])
            assert {place: committed[place] for place in kept} == kept


def test_processes_share_a_topic_and_none_reads_what_another_read(backend: Backend, log: Log) -> None:
    """They join while records keep coming, so that partitions change hands in the middle."""
    enough, num = threading.Event(), itertools.count()

    def feed() -> None:
        while not enough.wait(0.005):
            fill(log, 5, "prompts", first=5 * next(num))

    feeder = threading.Thread(target=feed)
    feeder.start()
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(backend.process("take", "g", "prompts")) for _ in range(3)]
        told = [line for process in processes for line in process.lines(1)]  # each of them has had a share
        enough.set()
        feeder.join()
        wait_until(lambda: log.committed("g", ["prompts"]) == log.end_offsets("prompts"))
        told += [line for process in processes for line in process.rest()]
    assert sorted(int(value) for _, _, value in told) == list(range(5 * next(num)))


def test_seek_of_a_partition_that_a_member_does_not_hold_is_an_error(log: Log) -> None:
    with log.subscribe("g", ["prompts"]), log.subscribe("g", ["prompts"]) as other, pytest.raises(LogError):
        other.seek({("prompts", 0): 0})


# Runs


def test_runs_in_one_log_never_mix(backend: Backend) -> None:
    one, other = backend.open("one"), backend.open("other")
    fill(one, 3)
    one.append([Output("roles", b"k", b"v")])
    with one.subscribe("g", ["in"]) as consumer:
        consumer.commit(behind(take(consumer, 3)))
    assert everything(other, "in") == []
    assert other.newest("roles") == {}
    assert other.committed("g", ["in"]) == {IN: 0}
    assert everything(one, "in")[0].topic == "in"


# Retention and compaction


def test_an_offset_that_was_trimmed_raises_and_is_never_skipped(log: Log) -> None:
    fill(log, 10)
    with log.assign({IN: 0}) as reader, log.subscribe("g", ["in"]) as consumer:
        take(consumer, 10)
        consumer.seek({IN: 0})
        log.trim({IN: 4})
        for one in (reader, consumer, log.assign({IN: 3})):
            with pytest.raises(TrimmedError, match="in/0@"):
                one.read(max_records=9, timeout_s=0)
        reader.seek({IN: 4})
        assert numbers(drain(reader)) == [4, 5, 6, 7, 8, 9]


def test_a_group_whose_place_was_trimmed_is_told_and_never_skips(log: Log) -> None:
    fill(log, 10)
    with log.subscribe("g", ["in"]) as consumer:
        consumer.commit(behind(consumer.read(max_records=2, timeout_s=60)))
    log.trim({IN: 4})
    with log.subscribe("g", ["in"]) as consumer, pytest.raises(TrimmedError, match="in/0@2"):
        consumer.read(max_records=9, timeout_s=60)


def test_a_trim_moves_the_beginning_and_nothing_else(log: Log) -> None:
    fill(log, 10)
    log.trim({IN: 4})
    log.trim({IN: 2})  # never back
    assert (log.begin_offsets("in"), log.end_offsets("in")) == ({IN: 4}, {IN: 10})
    assert log.committed("g", ["in"]) == {IN: 4}
    with log.subscribe("g", ["in"]) as consumer:
        assert numbers(take(consumer, 6)) == [4, 5, 6, 7, 8, 9]


def test_offsets_go_on_after_everything_was_trimmed(log: Log) -> None:
    fill(log, 10)
    log.trim({IN: 99})
    assert (log.begin_offsets("in"), log.end_offsets("in")) == ({IN: 10}, {IN: 10})
    assert log.append([Output("in", b"k", b"v")]) == [(0, 10)]
    with pytest.raises(TrimmedError):
        log.assign({IN: 0}).read(max_records=1, timeout_s=0)


def test_a_reader_at_the_end_waits_on_after_a_trim(log: Log) -> None:
    fill(log, 3)
    with log.assign({IN: 3}) as reader:
        log.trim({IN: 3})
        assert reader.read(max_records=1, timeout_s=0) == []
        fill(log, 1, first=3)
        assert numbers(drain(reader)) == [3]


def test_a_compacted_topic_keeps_the_newest_record_of_each_key(backend: Backend, log: Log) -> None:
    for i in range(30):
        log.append([Output("roles", b"key%d" % (i % 3), b"%d" % i)])
    newest = backend.open().newest("roles")
    assert {key: (entry.value, entry.offset) for key, entry in newest.items()} == {
        b"key0": (b"27", 27),
        b"key1": (b"28", 28),
        b"key2": (b"29", 29),
    }
    assert newest[b"key0"].key == b"key0"
    assert newest[b"key0"].time_s > 0


def test_a_follower_of_a_compacted_topic_ends_with_the_newest_of_each_key(log: Log) -> None:
    with log.assign(log.begin_offsets("roles")) as reader:
        for i in range(30):
            log.append([Output("roles", b"key%d" % (i % 3), b"%d" % i)])
        seen = {entry.key: entry.value for entry in drain(reader)}
        assert seen == {b"key0": b"27", b"key1": b"28", b"key2": b"29"}
        log.append([Output("roles", b"key0", b"30")])
        assert [entry.value for entry in drain(reader)] == [b"30"]


def test_the_same_key_twice_in_one_append_keeps_the_later(log: Log) -> None:
    log.append([Output("roles", b"k", b"1"), Output("roles", b"k", b"2")])
    assert [entry.value for entry in log.newest("roles").values()] == [b"2"]


def test_a_deleted_key_is_not_among_the_newest_of_a_log_that_knew_it(backend: Backend, log: Log) -> None:
    """An open log on Kafka passed tombstones over, and showed what it had found before for as long as it was open."""
    log.append([Output("roles", b"a", b"1"), Output("roles", b"b", b"1")])
    assert set(log.newest("roles")) == {b"a", b"b"}
    backend.delete("roles", b"a")
    for each in (log, backend.open()):
        assert {key: entry.value for key, entry in each.newest("roles").items()} == {b"b": b"1"}
    backend.delete("roles", b"b")
    log.append([Output("roles", b"b", b"2")])
    assert {key: entry.value for key, entry in log.newest("roles").items()} == {b"b": b"2"}


def test_bytes_that_are_no_record_take_no_records_place(backend: Backend, log: Log) -> None:
    states = [encode(make_role(epoch=epoch)) for epoch in (1, 2)]
    log.append([Output("roles", b"k", value) for value in (b"junk", states[0], b"junk", b"more junk")])
    log.append([Output("roles", b"none", b"junk"), Output("roles", b"none", b"more junk")])
    for one in (log, backend.open()):
        assert {key: entry.value for key, entry in one.newest("roles").items()} == {
            b"k": states[0],
            b"none": b"more junk",
        }
    log.append([Output("roles", b"k", states[1])])
    assert (log.newest("roles")[b"k"].value, log.newest("roles")[b"k"].offset) == (states[1], 6)


def test_only_a_compacted_topic_has_newest_records(log: Log) -> None:
    with pytest.raises(LogError):
        log.newest("prompts")


def test_closing_twice_does_nothing_and_leaves_the_group(backend: Backend, log: Log) -> None:
    fill(log, 3)
    log.subscribe("g", ["in"])
    consumer = log.subscribe("h", ["in"])
    log.close()
    consumer.close()
    log.close()
    with backend.open().subscribe("h", ["in"]) as later:
        assert numbers(take(later, 3)) == [0, 1, 2]
