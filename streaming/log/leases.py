"""Who reads which partition: consumer groups on SQLite, by leases.

    join -> holds a fair share -> (gives up what is another's share at its next read) -> leaves, or expires

A partition has one holder at a time, and its lease's generation rises with every change of hands: a holder that was
taken for dead cannot commit any more. A group's own generation rises with every change, so that members see one.
"""

from collections.abc import Callable, Collection, Mapping
from secrets import token_hex
from typing import NamedTuple

from streaming.errors import LeaseLostError
from streaming.log.store import Database, Writer


def share(members: Collection[str], partitions: Collection[int], holders: Mapping[int, str | None]) -> dict[int, str]:
    """Deal one topic's partitions to the members: counts differ by one at most, and as few as possible move."""
    kept = ((partition, holders.get(partition)) for partition in sorted(partitions))
    dealt = {partition: member for partition, member in kept if member is not None and member in members}
    counts = dict.fromkeys(sorted(members), 0)
    for member in dealt.values():
        counts[member] += 1
    for partition in sorted(set(partitions) - set(dealt)):
        _give(partition, dealt, counts)
    while max(counts.values()) - min(counts.values()) > 1:
        richest = max(counts, key=counts.__getitem__)
        partition = next(partition for partition, member in dealt.items() if member == richest)
        counts[richest] -= 1
        _give(partition, dealt, counts)
    return dealt


def _give(partition: int, dealt: dict[int, str], counts: dict[str, int]) -> None:
    poorest = min(counts, key=counts.__getitem__)
    dealt[partition] = poorest
    counts[poorest] += 1


_FURTHEST = 2
"""Leases' lengths from now that a lease may end at: one that ends later was given before the clock went back."""


class _Lease(NamedTuple):
    """Who holds a partition."""

    member: str | None
    generation: int


class Membership:
    """One member of one group. `held` maps each partition it holds to its lease's generation."""

    def __init__(
        self, writer: Writer, group: str, topics: Mapping[str, list[int]], *, lease_s: float, clock: Callable[[], float]
    ) -> None:
        """Join. What nobody holds is this member's at once; what is its fair share follows as others give it up."""
        self.group = group
        self.member = token_hex(8)
        self.held: dict[int, int] = {}
        self._writer = writer
        self._topics = topics
        self._lease_s = lease_s
        self._clock = clock
        self._generation = 0
        self._looked_s = 0.0
        self.balance()

    def is_stale(self, database: Database) -> bool:
        """Whether the group has changed since this member last looked, and it has lost, or has to give up or take.

        Most changes of a large group are the business of two others; finding that out takes no write lock.
        """
        generation = _generation(database, self.group)
        if generation == self._generation:
            return False
        if self._is_concerned(database):
            return True
        self._generation = generation  # asked for first: what has changed behind it is seen the next time
        return False

    def is_due(self) -> bool:
        """Whether it is time to look for members that have died; a clock that has gone back does not put it off."""
        return not 0 <= self._clock() - self._looked_s < self._lease_s / 3

    def balance(self) -> None:
        """Renew, bury the dead, give up what is another's share, take what is free of one's own."""
        self._looked_s = self._clock()
        self.held, self._generation = self._writer.run(self._balance)

    def renew(self, database: Database) -> None:
        """Stay alive, without looking at anything. A member that was buried already stays so until it balances."""
        database.rows(
            "UPDATE members SET expires_s = ? WHERE name = ? AND member = ?",
            [self._clock() + self._lease_s, self.group, self.member],
        )

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Make the offsets durable, all of them or (where one of the leases is lost) none."""
        held = dict(self.held)

        def work(database: Database) -> None:
            for partition in offsets:
                if _lease(database, self.group, partition) != (self.member, held.get(partition)):
                    raise LeaseLostError(
                        f"partition {partition} is another member's by now",
                        where=f"group {self.group}",
                        do="Nothing was committed. Read on: the new holder does the work again.",
                    )
            database.many(
                "INSERT OR REPLACE INTO committed VALUES (?, ?, ?)",
                [(self.group, partition, offset) for partition, offset in offsets.items()],
            )

        self._writer.run(work)

    def leave(self) -> None:
        """Give everything back at once."""

        def work(database: Database) -> None:
            _bury(database, self.group, self.member)
            _advance(database, self.group)

        self._writer.run(work)
        self.held = {}

    def _balance(self, database: Database) -> tuple[dict[int, int], int]:
        now = self._clock()
        changed = self._join(database)
        dead = database.rows(
            "SELECT member FROM members WHERE name = ? AND expires_s NOT BETWEEN ? AND ?",
            [self.group, now, now + _FURTHEST * self._lease_s],
        )
        for (member,) in dead:
            _bury(database, self.group, member)
        for partitions in self._topics.values():
            changed |= self._take_share(database, partitions)
        if changed or dead:
            _advance(database, self.group)
        held = database.rows(
            "SELECT partition, generation FROM leases WHERE name = ? AND member = ?", [self.group, self.member]
        )
        return dict(held), _generation(database, self.group)

    def _join(self, database: Database) -> bool:
        """Renew the membership, or begin it where there is none (any more)."""
        self.renew(database)
        if database.num_changes():
            return False
        expires_s = self._clock() + self._lease_s
        database.rows("INSERT INTO members VALUES (?, ?, ?)", [self.group, self.member, expires_s])
        for partitions in self._topics.values():
            rows = [(self.group, self.member, partition) for partition in partitions]
            database.many("INSERT INTO interests VALUES (?, ?, ?)", rows)
            free = [(self.group, partition) for partition in partitions]
            database.many("INSERT OR IGNORE INTO leases VALUES (?, ?, NULL, 0)", free)
        return True

    def _is_concerned(self, database: Database) -> bool:
        held: dict[int, int] = {}
        for partitions in self._topics.values():
            members, leases = _look(database, self.group, partitions)
            if self.member not in members or any(self._moves(members, leases)):
                return True
            held |= {partition: lease.generation for partition, lease in leases.items() if lease.member == self.member}
        return held != self.held

    def _take_share(self, database: Database, partitions: list[int]) -> bool:
        """Of one topic: give up and take leases as is fair. Returns whether anything changed."""
        given, taken = self._moves(*_look(database, self.group, partitions))
        _hand_over(database, self.group, given, None)
        _hand_over(database, self.group, taken, self.member)
        return bool(given or taken)

    def _moves(self, members: set[str], leases: Mapping[int, _Lease]) -> tuple[list[int], list[int]]:
        """What this member has to give up of a topic, and what it may take."""
        holders = {partition: lease.member for partition, lease in leases.items()}
        dealt = share(members, holders, holders)
        given = [partition for partition in holders if holders[partition] == self.member != dealt[partition]]
        taken = [partition for partition in holders if holders[partition] is None and dealt[partition] == self.member]
        return given, taken


def renew_all(members: Collection[Membership], database: Database) -> None:
    """Keep members alive while they are busy with what they read."""
    for member in members:
        member.renew(database)


def _hand_over(database: Database, group: str, partitions: list[int], member: str | None) -> None:
    database.many(
        "UPDATE leases SET member = ?, generation = generation + 1 WHERE name = ? AND partition = ?",
        [(member, group, partition) for partition in partitions],
    )


def _lease(database: Database, group: str, partition: int) -> _Lease | None:
    rows = database.rows("SELECT member, generation FROM leases WHERE name = ? AND partition = ?", [group, partition])
    return _Lease(*rows[0]) if rows else None


def _look(database: Database, group: str, partitions: list[int]) -> tuple[set[str], dict[int, _Lease]]:
    """Of one topic: the members, and every partition's lease."""
    first, last = partitions[0], partitions[-1]
    members = database.rows(
        "SELECT member FROM members WHERE name = ? AND EXISTS (SELECT 1 FROM interests WHERE"
        " interests.name = members.name AND interests.member = members.member AND partition = ?)",
        [group, first],
    )
    leases = database.rows(
        "SELECT partition, member, generation FROM leases WHERE name = ? AND partition BETWEEN ? AND ?",
        [group, first, last],
    )
    return {member for (member,) in members}, {partition: _Lease(*lease) for partition, *lease in leases}


def _generation(database: Database, group: str) -> int:
    return int(database.value("SELECT generation FROM groups WHERE name = ?", [group]))


def _bury(database: Database, group: str, member: str) -> None:
    """Free everything that a member held."""
    held = database.rows("SELECT partition FROM leases WHERE name = ? AND member = ?", [group, member])
    _hand_over(database, group, [partition for (partition,) in held], None)
    database.rows("DELETE FROM interests WHERE name = ? AND member = ?", [group, member])
    database.rows("DELETE FROM members WHERE name = ? AND member = ?", [group, member])


def _advance(database: Database, group: str) -> None:
    database.rows(
        "INSERT INTO groups VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET generation = generation + 1", [group]
    )
