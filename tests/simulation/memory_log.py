"""The log in memory: the protocol of `streaming/log/protocol.py`, with faults where a real one could have them.

A `Store` is what all processes share; a `MemoryLog` is one process's way to it. Every request is a moment at which
other processes may run, and this one may die: before an append, with a part of it durable, or with all of it.
Nothing is ever forgotten behind the scenes: `archive` reads what retention and compaction have taken.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from streaming import topics as table
from streaming.errors import LeaseLostError, LogError, TooLargeError, TrimmedError
from streaming.log.compaction import is_superseded
from streaming.log.protocol import Consumer, Entry, Log, Offsets, Output, Partition
from tests.simulation.fibers import Fiber, Process

LEASE_S = 10.0
"""A member that was silent for so long is dead, and its partitions go to others."""

MAX_RECORD_BYTES = 2**20

_COARSE_S = 0.3
"""Shortest wait for an entry: fewer looks at nothing."""

AppendFault = Callable[[Process, Sequence[Output]], str | None]
"""What goes wrong with an append: None, "unknown", "refused", "duplicate", "partial" or "crash"."""

Damage = Callable[[Process, Sequence[Output]], Sequence[Output]]
"""What becomes durable of an append: the same, or some of it with other bytes."""

Shorten = Callable[[int], int]
"""How many of so many entries a read returns."""


class Member:
    """A consumer in a group."""

    def __init__(self, process: Process | None, places: list[Partition]) -> None:
        self.process = process
        self.places = places

    def is_silent(self) -> bool:
        process = self.process
        if process is None or process.silent_since_s is None:
            return False
        return process.world.now_s - process.silent_since_s > LEASE_S


class Group:
    """Who reads what, and how far. A partition that changes hands begins a new generation."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.leases: dict[Partition, tuple[Member | None, int]] = {}
        self.committed: dict[Partition, int] = {}
        self._is_balanced = False

    def join(self, member: Member) -> None:
        if member not in self.members:
            self.members.append(member)
            self._is_balanced = False

    def balance(self) -> None:
        """Every partition has a living member, and no member has two more than another."""
        if self._is_balanced and not any(member.is_silent() for member in self.members):
            return
        self._is_balanced = True
        self.members = [member for member in self.members if not member.is_silent()]
        for place in {place: None for member in self.members for place in member.places}:
            holder, generation = self.leases.get(place, (None, 0))
            readers = [member for member in self.members if place in member.places]
            poorest = min(readers, key=self._num_held)
            is_held = holder in readers
            if not is_held or (holder is not None and self._num_held(holder) > self._num_held(poorest) + 1):
                self.leases[place] = (poorest, generation + 1)
                self._is_balanced = False

    def leave(self, member: Member) -> None:
        self._is_balanced = False
        self.members = [other for other in self.members if other is not member]
        for place, (holder, generation) in list(self.leases.items()):
            if holder is member:
                self.leases[place] = (None, generation + 1)

    def held(self, member: Member) -> dict[Partition, int]:
        """Partitions of a member, each with its generation."""
        return {place: generation for place, (holder, generation) in self.leases.items() if holder is member}

    def _num_held(self, member: Member) -> int:
        return sum(holder is member for holder, _ in self.leases.values())


class Store:
    """What is durable."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.groups: dict[str, Group] = {}
        self.waiting: dict[str, dict[Fiber | None, None]] = {}  # topic -> who waits for something to be appended
        self.history: list[Entry] = []  # everything ever appended, in the order of time
        self._partitions: dict[str, list[list[Entry]]] = {}
        self._newest: dict[str, dict[bytes, Entry]] = {}
        self._compacted: set[tuple[str, int, int]] = set()
        self._begins: dict[Partition, int] = {}
        self.fault: AppendFault = lambda process, outputs: None
        self.damage: Damage = lambda process, outputs: outputs
        self.shorten: Shorten = lambda num: num

    def append(self, outputs: Sequence[Output]) -> list[tuple[int, int]]:
        return [self._append(output) for output in outputs]

    def partitions(self, topic: str) -> list[list[Entry]]:
        if topic not in self._partitions:
            row = table.find(topic)
            self._partitions[topic] = [[] for _ in range(row.partitions if row else 1)]
            if row is not None and row.compacted:
                self._newest[topic] = {}
        return self._partitions[topic]

    def partition(self, place: Partition) -> list[Entry]:
        parts = self.partitions(place[0])
        if not 0 <= place[1] < len(parts):
            raise LogError("there is no such partition", where=f"{place[0]}/{place[1]}", do=f"There are {len(parts)}.")
        return parts[place[1]]

    def begin(self, place: Partition) -> int:
        return self._begins.get(place, 0)

    def trim(self, place: Partition, offset: int) -> None:
        self._begins[place] = max(self.begin(place), min(offset, len(self.partition(place))))

    def newest(self, topic: str) -> dict[bytes, Entry]:
        self.partitions(topic)
        if topic not in self._newest:
            raise LogError("it keeps no newest record per key", where=topic, do="Ask this of a compacted topic.")
        return self._newest[topic]

    def is_there(self, entry: Entry) -> bool:
        """Whether compaction has left it."""
        return (entry.topic, entry.partition, entry.offset) not in self._compacted

    def group(self, name: str) -> Group:
        return self.groups.setdefault(name, Group())

    def archive(self) -> "MemoryLog":
        """A log in which nothing was ever trimmed or compacted, with the same committed offsets."""
        whole = Store(self.clock)
        whole.groups = self.groups
        for entry in self.history:
            whole.partitions(entry.topic)[entry.partition].append(entry)
        whole._newest = {topic: dict(entries) for topic, entries in self._newest.items()}
        whole.is_there = lambda entry: True  # type: ignore[method-assign]
        return MemoryLog(whole)

    def _append(self, output: Output) -> tuple[int, int]:
        parts = self.partitions(output.topic)
        number = zlib.crc32(output.key) % len(parts)
        entry = Entry(output.topic, number, len(parts[number]), output.key, output.value, self.clock())
        parts[number].append(entry)
        self.history.append(entry)
        if output.topic in self._newest:
            self._compact(entry)
        for fiber in self.waiting.get(output.topic, ()):
            if fiber is not None:
                fiber.wake()
        return number, entry.offset

    def _compact(self, entry: Entry) -> None:
        newest = self._newest[entry.topic]
        before = newest.get(entry.key)
        if before is not None:
            if not is_superseded(entry.topic, before.value, entry.value):
                return
            self._compacted.add((before.topic, before.partition, before.offset))
        newest[entry.key] = entry


class MemoryLog(Log):
    """One process's log; without a process, one in which nothing ever goes wrong."""

    def __init__(self, store: Store, process: Process | None = None) -> None:
        self.store = store
        self._process = process

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        written = list(outputs)
        if not written:
            return []
        for output in written:
            if len(output.value) > MAX_RECORD_BYTES:
                raise TooLargeError(f"{len(output.value)} bytes", where=output.topic, do="Nothing was appended.")
        self._pass_by("append " + ", ".join(f"{output.topic} {output.key!r}" for output in written))
        places = self._append(written)
        self._pass_by("acknowledged")
        return places

    def _append(self, outputs: Sequence[Output]) -> list[tuple[int, int]]:
        process = self._process
        if process is None:
            return self.store.append(outputs)
        outputs = self.store.damage(process, outputs)
        fault = self.store.fault(process, outputs)
        if fault is None:
            return self.store.append(outputs)
        process.world.tell(process, f"FAULT append {fault}")
        if fault == "refused":
            raise _unknown("the append was refused")
        if fault == "partial":  # each partition got some of its records, in their order
            self.store.append(_some(outputs, process))
            process.kill()
        if fault == "duplicate":  # sent again, because the first acknowledgement was lost
            self.store.append(outputs)
        places = self.store.append(outputs)
        if fault == "unknown":
            raise _unknown("nobody knows whether the append is durable")
        if fault == "crash":
            process.kill()
        return places

    def subscribe(self, group: str, topics: Sequence[str]) -> "MemoryConsumer":
        self._pass_by(f"subscribe {group}")
        places = [(topic, number) for topic in topics for number in range(len(self.store.partitions(topic)))]
        found = self.store.group(group)
        member = Member(self._process, places)
        found.join(member)
        return MemoryConsumer(self.store, self._process, {}, group=found, member=member)

    def assign(self, offsets: Offsets) -> "MemoryConsumer":
        for place in offsets:
            self.store.partition(place)
        return MemoryConsumer(self.store, self._process, dict(offsets))

    def begin_offsets(self, topic: str) -> dict[Partition, int]:
        self._pass_by("begin_offsets")
        return {(topic, i): self.store.begin((topic, i)) for i in range(len(self.store.partitions(topic)))}

    def end_offsets(self, topic: str) -> dict[Partition, int]:
        self._pass_by("end_offsets")
        return {(topic, i): len(part) for i, part in enumerate(self.store.partitions(topic))}

    def committed(self, group: str, topics: Sequence[str]) -> dict[Partition, int]:
        self._pass_by("committed")
        found = self.store.group(group).committed
        places = [(topic, i) for topic in topics for i in range(len(self.store.partitions(topic)))]
        return {place: found.get(place, self.store.begin(place)) for place in places}

    def newest(self, topic: str) -> dict[bytes, Entry]:
        self._pass_by(f"newest {topic}")
        return dict(self.store.newest(topic))

    def trim(self, offsets: Offsets) -> None:
        for place, offset in offsets.items():
            self.store.trim(place, offset)

    def close(self) -> None:
        return

    def _pass_by(self, what: str) -> None:
        if self._process is not None:
            self._process.pass_by(what)


class MemoryConsumer(Consumer):
    """A member of a group, or a reader of named partitions."""

    def __init__(
        self,
        store: Store,
        process: Process | None,
        positions: dict[Partition, int],
        *,
        group: Group | None = None,
        member: Member | None = None,
    ) -> None:
        self._store = store
        self.process = process
        self._positions = positions
        self.group = group
        self.member = member
        self._generations: Mapping[Partition, int] = {}
        self._turn = 0
        self._follow()

    def read(self, *, max_records: int, timeout_s: float) -> list[Entry]:
        self._pass_by("read")
        entries = self._look(max_records)
        if not entries and timeout_s > 0 and self.process is not None:
            self._wait(self.process, max(timeout_s, _COARSE_S))
            entries = self._look(max_records)
        return entries

    def commit(self, offsets: Offsets) -> None:
        self._pass_by(f"commit {dict(offsets)}")
        if self.group is None or self.member is None:
            raise LogError("a reader without a group has nothing to commit", where="commit", do="Use subscribe().")
        held = self.group.held(self.member)
        for place in offsets:
            if place not in self._positions or held.get(place) != self._generations.get(place):
                raise LeaseLostError("another member holds it", where=f"{place}", do="Read on.")
        self.group.committed |= offsets
        self._pass_by("committed")

    def seek(self, offsets: Offsets) -> None:
        for place in offsets:
            if place not in self._positions:
                raise LogError("this reader does not hold the partition", where=f"{place}", do="Seek what it holds.")
        self._positions |= offsets

    def positions(self) -> dict[Partition, int]:
        return dict(self._positions)

    def behind(self) -> dict[Partition, int]:
        return {place: len(self._store.partition(place)) - offset for place, offset in self._positions.items()}

    def close(self) -> None:
        if self.process is not None and self.process.is_dead:
            return
        if self.group is not None and self.member is not None:
            self.group.leave(self.member)

    def _look(self, max_records: int) -> list[Entry]:
        self._follow()
        self._turn += 1
        places = list(self._positions)
        entries: list[Entry] = []
        for i in range(len(places)):
            entries += self._fetch(places[(i + self._turn) % len(places)], max_records - len(entries))
        entries = entries[: self._store.shorten(len(entries))] if self.process is not None else entries
        for entry in entries:
            self._positions[entry.topic, entry.partition] = entry.offset + 1
        return entries

    def _fetch(self, place: Partition, max_records: int) -> list[Entry]:
        part, position = self._store.partition(place), self._positions[place]
        if position > len(part):
            raise LogError(f"offset {position} is beyond the end", where=f"{place}", do="Use the run's own log.")
        if position < self._store.begin(place):
            raise TrimmedError("passed retention", where=f"{place[0]}/{place[1]}@{position}", do="It is gone.")
        there = (entry for entry in part[position:] if self._store.is_there(entry))
        return [entry for _, entry in zip(range(max_records), there, strict=False)]

    def _wait(self, process: Process, seconds: float) -> None:
        """Until something is appended to one of the topics, or so long."""
        names = {topic for topic, _ in self._positions}
        waiting = [self._store.waiting.setdefault(name, {}) for name in sorted(names)]
        fiber = process.world.current
        for fibers in waiting:
            fibers[fiber] = None
        process.wait(seconds * (0.5 + process.world.chance.random()), "read waits")
        for fibers in waiting:
            fibers.pop(fiber, None)

    def _follow(self) -> None:
        """Begin at the committed offset of what is newly held, stay where we are in what is still held."""
        if self.group is None or self.member is None:
            return
        self.group.join(self.member)  # it may have been silent for long, and was buried, and lives
        self.group.balance()
        held = self.group.held(self.member)
        committed = self.group.committed
        self._positions = {
            place: self._positions[place]
            if place in self._positions and self._generations.get(place) == generation
            else committed.get(place, self._store.begin(place))
            for place, generation in held.items()
        }
        self._generations = held

    def _pass_by(self, what: str) -> None:
        if self.process is not None:
            self.process.pass_by(what)


def _unknown(what: str) -> LogError:
    return LogError(what, where="log", do="Start again: readers keep the first of two copies.")


def _some(outputs: Sequence[Output], process: Process) -> list[Output]:
    """A prefix per key: a cluster acknowledges each partition by itself."""
    chance = process.world.chance
    kept: list[Output] = []
    cut: set[tuple[str, int]] = set()
    for output in outputs:
        place = (output.topic, zlib.crc32(output.key) % 4)
        if place not in cut and chance.random() < 0.6:
            kept.append(output)
        else:
            cut.add(place)
    return kept
