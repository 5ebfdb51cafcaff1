"""Fair shares, and leases whose time the test advances."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.errors import LeaseLostError
from streaming.log.leases import Membership, share
from streaming.log.protocol import Log, Output
from streaming.log.sqlite import LEASE_S, SQLiteLog
from streaming.log.store import Database, Writer
from streaming.metrics import Metrics
from tests.fakes import Clock
from tests.faulty_disk import FaultyDisk

MEMBERS = st.sets(st.sampled_from("abcde"), min_size=1)
HOLDERS = st.dictionaries(st.integers(0, 7), st.sampled_from("abcdexyz"))
PARTITIONS = list(range(8))


@given(MEMBERS, HOLDERS)
def test_shares_differ_by_one_at_most_and_leave_nothing_out(members: set[str], holders: dict[int, str]) -> None:
    dealt = share(members, PARTITIONS, holders)
    counts = Counter(dict.fromkeys(members, 0)) + Counter(dealt.values())
    sizes = [counts[member] for member in members]
    assert sorted(dealt) == PARTITIONS
    assert set(dealt.values()) <= members
    assert max(sizes) - min(sizes) <= 1


@given(MEMBERS, HOLDERS)
def test_as_few_partitions_move_as_possible(members: set[str], holders: dict[int, str]) -> None:
    dealt = share(members, PARTITIONS, holders)
    kept = Counter(member for partition, member in holders.items() if dealt[partition] == member)
    held = Counter(member for member in holders.values() if member in members)
    floor, num_ceilings = divmod(len(PARTITIONS), len(members))
    rich = sorted((min(held[member], floor + 1) for member in members), reverse=True)
    possible = sum(rich[:num_ceilings]) + sum(min(count, floor) for count in rich[num_ceilings:])
    assert kept.total() == possible


@given(MEMBERS, HOLDERS)
def test_a_deal_that_is_done_stays_as_it_is(members: set[str], holders: dict[int, str]) -> None:
    dealt = share(members, PARTITIONS, holders)
    assert share(members, PARTITIONS, dealt) == dealt


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_log(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], Log]]:
    """Logs of one file, as if of several processes, all on the test's clock."""
    opened = []

    def open_one() -> Log:
        opened.append(SQLiteLog(tmp_path / "log.db", run="test", max_record_bytes=2**20, max_bytes=2**30, clock=clock))
        return opened[-1]

    yield open_one
    for log in opened:
        log.close()


def test_a_change_that_is_the_business_of_two_others_takes_no_transaction(tmp_path: Path) -> None:
    """Every change used to take one of every member: with hundreds of them, one that joined held up all for seconds."""
    writer, database = Writer(tmp_path / "log.db"), Database(tmp_path / "log.db")
    with closing(writer), closing(database):

        def join() -> Membership:
            return Membership(writer, "group", {"prompts": PARTITIONS[:4]}, lease_s=60, clock=Clock())

        def stale(*members: Membership) -> list[Membership]:
            return [member for member in members if member.is_stale(database)]

        one, two, three = join(), join(), join()
        while concerned := stale(one, two, three):
            for member in concerned:
                member.balance()
        assert sorted(len(member.held) for member in (one, two, three)) == [1, 1, 2]
        four, num_commits = join(), writer.num_commits
        richest = max((one, two, three), key=lambda member: len(member.held))
        assert stale(one, two, three) == [richest]
        richest.balance()
        assert stale(one, two, three, four) == [four]
        four.balance()
        assert stale(one, two, three, four) == []
        assert writer.num_commits == num_commits + 2
        two.leave()
        assert stale(two) == [two]


def read(consumer) -> int:  # type: ignore[no-untyped-def]
    return len(consumer.read(max_records=99, timeout_s=0))


def test_a_member_that_is_not_heard_of_loses_its_partitions_and_cannot_commit(
    open_log: Callable[[], Log], clock: Clock
) -> None:
    log = open_log()
    log.append([Output("in", b"k", b"v")])
    silent, waiting = log.subscribe("g", ["in"]), open_log().subscribe("g", ["in"])
    assert (read(silent), read(waiting)) == (1, 0)
    clock.advance(LEASE_S + 1)
    assert read(waiting) == 1
    with pytest.raises(LeaseLostError):
        silent.commit({("in", 0): 1})
    assert log.committed("g", ["in"]) == {("in", 0): 0}
    waiting.commit({("in", 0): 1})
    assert read(silent) == 0
    assert silent.positions() == {}


def test_a_member_that_reads_in_time_keeps_its_partitions(open_log: Callable[[], Log], clock: Clock) -> None:
    log = open_log()
    log.append([Output("in", b"k", b"v")])
    steady, waiting = log.subscribe("g", ["in"]), open_log().subscribe("g", ["in"])
    assert read(steady) == 1
    for _ in range(5):
        clock.advance(LEASE_S / 2)
        assert (read(steady), read(waiting)) == (0, 0)
    steady.commit({("in", 0): 1})


@pytest.mark.fault("clock jump", backend="sqlite")
def test_a_member_that_died_before_the_clock_went_back_loses_its_partitions(
    open_log: Callable[[], Log], clock: Clock
) -> None:
    """Its lease seemed to go on for the hour that the clock had lost, and nobody read on."""
    log = open_log()
    log.append([Output("in", b"k", b"v")])
    silent, waiting = log.subscribe("g", ["in"]), open_log().subscribe("g", ["in"])
    assert (read(silent), read(waiting)) == (1, 0)
    clock.advance(-3600)
    assert read(waiting) == 1
    with pytest.raises(LeaseLostError):
        silent.commit({("in", 0): 1})


@pytest.mark.fault("clock jump", backend="sqlite")
def test_members_that_live_share_on_whatever_the_clock_does(open_log: Callable[[], Log], clock: Clock) -> None:
    log = open_log()
    members = [open_log().subscribe("g", ["prompts"]) for _ in range(2)]
    for jump in (3600, -3600, -86400, 86400):
        clock.advance(jump)
        for _ in range(3):
            for member in members:
                read(member)
        assert [len(member.positions()) for member in members] == [2, 2]
        log.append([Output("prompts", b"%d" % i, b"v") for i in range(40)])
        assert sum(map(read, members)) == 40
        for member in members:
            member.commit(member.positions())


def test_a_late_member_that_nobody_replaced_goes_on(open_log: Callable[[], Log], clock: Clock) -> None:
    log = open_log()
    log.append([Output("in", b"k", b"v")])
    alone = log.subscribe("g", ["in"])
    assert read(alone) == 1
    clock.advance(100 * LEASE_S)
    alone.commit({("in", 0): 1})
    assert read(alone) == 0


def test_a_partition_that_comes_back_is_read_from_the_committed_offset(
    open_log: Callable[[], Log], clock: Clock
) -> None:
    """Its lease has another generation: what was read under the old one is read again."""
    log = open_log()
    log.append([Output("in", b"k", b"v")] * 3)
    first, second = log.subscribe("g", ["in"]), open_log().subscribe("g", ["in"])
    assert read(first) == 3
    clock.advance(LEASE_S + 1)
    assert read(second) == 3
    clock.advance(LEASE_S + 1)
    assert read(first) == 3
    with pytest.raises(LeaseLostError):
        second.commit({("in", 0): 3})
    first.commit({("in", 0): 3})


def test_four_members_hold_one_partition_each_and_a_fifth_waits(open_log: Callable[[], Log]) -> None:
    members = [open_log().subscribe("g", ["prompts"]) for _ in range(5)]
    for _ in range(3):
        for member in members:
            read(member)
    assert sorted(len(member.positions()) for member in members) == [0, 1, 1, 1, 1]
    assert len({place for member in members for place in member.positions()}) == 4


def test_a_consumer_that_nobody_refers_to_is_not_kept_alive(open_log: Callable[[], Log], clock: Clock) -> None:
    log = open_log()
    log.subscribe("g", ["in"])
    waiting = open_log().subscribe("g", ["in"])
    clock.advance(LEASE_S + 1)
    assert read(waiting) == 0
    assert waiting.positions() == {("in", 0): 0}


def test_after_a_renewal_that_failed_the_next_one_keeps_the_member_alive(tmp_path: Path) -> None:
    """The thread that renews ended at its first error, and a busy member's partitions went to others."""
    path, disk, metrics = tmp_path / "log.db", FaultyDisk(is_lasting=False), Metrics("scorer")
    with (
        SQLiteLog(
            path, run="test", max_record_bytes=2**20, max_bytes=2**30, lease_s=0.1, vfs=disk.name, metrics=metrics
        ) as log,
        log.subscribe("g", ["in"]),
        closing(Database(path)) as file,
    ):
        disk.fail_at = disk.num_done + 5
        wait_until(lambda: metrics.value("lease_renewals_failed_total") == 1)
        expires_s = file.value("SELECT expires_s FROM members")
        wait_until(lambda: file.value("SELECT expires_s FROM members") > expires_s)


def wait_until(condition: Callable[[], bool]) -> None:
    """For what another thread does."""
    for _ in range(6000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen within a minute")
