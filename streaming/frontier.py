"""Which work is settled, when it settles out of order. Pure: no log, no clock.

    read -> open -> settled; the frontier of a partition is its oldest open entry

Everything below the frontier is settled, so that is where a restart goes on. The frontier knows no records: what
settles an entry is the caller's business.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import count

from streaming.log.protocol import Partition

Interval = tuple[int, int]
"""[first, end): the first number and the one after the last."""


class IntervalSet:
    """A set of numbers that mostly lie next to each other: a few intervals, however many numbers."""

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        """From intervals in any order; they may touch and overlap."""
        self._firsts: list[int] = []
        self._ends: list[int] = []
        for first, end in sorted(intervals):
            if self._ends and first <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif first < end:
                self._firsts.append(first)
                self._ends.append(end)

    def add(self, number: int) -> None:
        """Put a number in; one that is in already changes nothing."""
        after = bisect_right(self._firsts, number)  # the interval at after - 1 is the last that begins at or below
        if after > 0 and number < self._ends[after - 1]:
            return
        touches_left = after > 0 and self._ends[after - 1] == number
        touches_right = after < len(self._firsts) and self._firsts[after] == number + 1
        if touches_left and touches_right:
            self._ends[after - 1] = self._ends.pop(after)
            del self._firsts[after]
        elif touches_left:
            self._ends[after - 1] = number + 1
        elif touches_right:
            self._firsts[after] = number
        else:
            self._firsts.insert(after, number)
            self._ends.insert(after, number + 1)

    def missing(self) -> Iterator[int]:
        """The numbers from 0 on that are not in it, ascending, without end."""
        behind = 0
        for first, end in self.intervals:
            yield from range(behind, first)
            behind = end
        yield from count(behind)

    @property
    def intervals(self) -> list[Interval]:
        """As few intervals as possible, ascending: what a checkpoint holds."""
        return list(zip(self._firsts, self._ends, strict=True))

    def __contains__(self, number: int) -> bool:
        after = bisect_right(self._firsts, number)
        return after > 0 and number < self._ends[after - 1]

    def __iter__(self) -> Iterator[int]:
        for first, end in self.intervals:
            yield from range(first, end)

    def __len__(self) -> int:
        """How many numbers are in it."""
        return sum(self._ends) - sum(self._firsts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntervalSet) and self.intervals == other.intervals

    def __repr__(self) -> str:
        return f"IntervalSet({self.intervals})"


class Frontier:
    """Entries that were read in order and settle in any order."""

    def __init__(self) -> None:
        self._open: dict[Partition, OrderedDict[int, None]] = {}
        self._next: dict[Partition, int] = {}

    def read(self, partition: Partition, offset: int) -> None:
        """An entry was read and is open now. A partition's offsets come in ascending order."""
        assert offset >= self._next.get(partition, 0), f"{partition}@{offset} was read before"
        self._open.setdefault(partition, OrderedDict())[offset] = None
        self._next[partition] = offset + 1

    def settle(self, partition: Partition, offset: int) -> None:
        """An open entry is done with, for ever."""
        del self._open[partition][offset]

    def forget(self, partition: Partition) -> None:
        """It is another's: it is read anew if it comes back."""
        self._open.pop(partition, None)
        self._next.pop(partition, None)

    def offsets(self) -> dict[Partition, int]:
        """Where to commit: everything below is settled. Of every partition that anything was read from."""
        return {
            partition: next(iter(self._open[partition]), behind_last) for partition, behind_last in self._next.items()
        }

    @property
    def pending(self) -> int:
        """How many entries are open."""
        return sum(len(entries) for entries in self._open.values())
