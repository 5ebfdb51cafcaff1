"""The log in memory keeps the promises of `streaming/log/protocol.py` that the simulation relies on."""

import pytest

from streaming.errors import LeaseLostError, LogError, TooLargeError, TrimmedError
from streaming.log.protocol import Consumer, Entry, Output, Partition
from streaming.records import encode
from tests.builders import make_role
from tests.simulation.fibers import World
from tests.simulation.memory_log import LEASE_S, MAX_RECORD_BYTES, MemoryLog, Store

IN = ("in", 0)
"""A topic that is in no table: it has one partition. "prompts" has four; "roles" is compacted and has one."""


@pytest.fixture
def world() -> World:
    return World(0)


@pytest.fixture
def log(world: World) -> MemoryLog:
    return MemoryLog(Store(lambda: world.now_s))


def fill(log: MemoryLog, num: int, topic: str = "in", first: int = 0) -> None:
    log.append([Output(topic, b"%d" % i, b"%d" % i) for i in range(first, first + num)])


def drain(consumer: Consumer) -> list[Entry]:
    found = []
    while entries := consumer.read(max_records=7, timeout_s=0):
        found += entries
    return found


def numbers(entries: list[Entry]) -> list[int]:
    return sorted(int(entry.value) for entry in entries)


def behind(entries: list[Entry]) -> dict[Partition, int]:
    return {(entry.topic, entry.partition): entry.offset + 1 for entry in entries}


def test_append_says_where_each_record_lies_and_offsets_are_dense(log: MemoryLog) -> None:
    outputs = [Output("prompts", b"%d" % (i % 5), b"%d" % i) for i in range(20)]
    places = log.append(outputs[:9]) + log.append(outputs[9:])
    entries = drain(log.assign(log.begin_offsets("prompts")))
    found = {(entry.partition, entry.offset): entry.value for entry in entries}
    assert [found[place] for place in places] == [output.value for output in outputs]
    assert {len({entry.partition for entry in entries if entry.key == b"%d" % i}) for i in range(5)} == {1}
    assert sum(log.end_offsets("prompts").values()) == 20


def test_one_record_above_the_limit_refuses_the_whole_append(log: MemoryLog) -> None:
    with pytest.raises(TooLargeError):
        log.append([Output("in", b"k", b""), Output("in", b"k", b"x" * (MAX_RECORD_BYTES + 1))])
    assert log.end_offsets("in") == {IN: 0}


def test_a_group_goes_on_where_it_committed(log: MemoryLog) -> None:
    fill(log, 10)
    with log.subscribe("g", ["in"]) as consumer:
        consumer.commit(behind(consumer.read(max_records=4, timeout_s=0)))
        assert len(consumer.read(max_records=3, timeout_s=0)) == 3  # read, never committed
    assert log.committed("g", ["in"]) == {IN: 4}
    with log.subscribe("g", ["in"]) as consumer:
        assert numbers(drain(consumer)) == [4, 5, 6, 7, 8, 9]


def test_members_share_partitions_and_no_entry_is_read_twice(log: MemoryLog) -> None:
    with log.subscribe("g", ["prompts"]) as one, log.subscribe("g", ["prompts"]) as other:
        for member in (one, other, one, other):
            assert member.read(max_records=1, timeout_s=0) == []
        assert len(one.positions()) == len(other.positions()) == 2
        fill(log, 40, "prompts")
        assert numbers(drain(one) + drain(other)) == list(range(40))


def test_what_moved_to_another_member_cannot_be_committed_and_is_read_there(log: MemoryLog) -> None:
    fill(log, 40, "prompts")
    with log.subscribe("g", ["prompts"]) as one:
        read = drain(one)
        with log.subscribe("g", ["prompts"]) as other:
            again = drain(other)
            moved = set(other.positions())
            assert numbers(again) == numbers([e for e in read if (e.topic, e.partition) in moved])
            with pytest.raises(LeaseLostError):
                one.commit(behind(read))
            assert set(log.committed("g", ["prompts"]).values()) == {0}
            assert drain(one) == []
            one.commit({place: offset for place, offset in behind(read).items() if place not in moved})


def test_a_silent_members_partitions_move_once_its_lease_is_over(log: MemoryLog, world: World) -> None:
    fill(log, 8, "prompts")
    dead = world.process("member", 1)
    MemoryLog(log.store, dead).subscribe("g", ["prompts"]).read(max_records=99, timeout_s=0)
    dead.kill()
    with log.subscribe("g", ["prompts"]) as other:
        held = len(drain(other))
        assert held < 8
        world.now_s += LEASE_S + 1
        assert held + len(drain(other)) == 8


def test_a_trimmed_offset_raises_and_is_never_skipped(log: MemoryLog) -> None:
    fill(log, 10)
    log.trim({IN: 4})
    log.trim({IN: 2})  # never back
    assert (log.begin_offsets("in"), log.end_offsets("in")) == ({IN: 4}, {IN: 10})
    reader = log.assign({IN: 3})
    with pytest.raises(TrimmedError, match="in/0@3"):
        reader.read(max_records=1, timeout_s=0)
    reader.seek({IN: 4})
    assert numbers(drain(reader)) == [4, 5, 6, 7, 8, 9]
    assert numbers(drain(log.store.archive().assign({IN: 0}))) == list(range(10))


def test_a_compacted_topic_keeps_the_newest_record_of_each_key(log: MemoryLog) -> None:
    for i in range(9):
        log.append([Output("roles", b"key%d" % (i % 3), b"%d" % i)])
    assert {key: entry.value for key, entry in log.newest("roles").items()} == {
        b"key0": b"6",
        b"key1": b"7",
        b"key2": b"8",
    }
    assert numbers(drain(log.assign(log.begin_offsets("roles")))) == [6, 7, 8]
    with pytest.raises(LogError):
        log.newest("prompts")


def test_bytes_that_are_no_record_take_no_records_place(log: MemoryLog) -> None:
    state = encode(make_role())
    log.append([Output("roles", b"k", value) for value in (b"junk", state, b"more junk")])
    log.append([Output("roles", b"none", b"junk"), Output("roles", b"none", b"more junk")])
    assert {key: entry.value for key, entry in log.newest("roles").items()} == {b"k": state, b"none": b"more junk"}


def test_a_reader_without_a_group_cannot_commit_and_an_offset_beyond_the_end_is_an_error(log: MemoryLog) -> None:
    fill(log, 3)
    with pytest.raises(LogError):
        log.assign({IN: 0}).commit({IN: 0})
    with pytest.raises(LogError, match="beyond"):
        log.assign({IN: 4}).read(max_records=1, timeout_s=0)
    with pytest.raises(LogError):
        log.assign({("in", 1): 0})
