"""The log from inside an event loop: consumers behind a thread of their own, so that sampling never waits for it."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from streaming import topics
from streaming.errors import LeaseLostError
from streaming.fencing import AWAY_S, Issuers, Verdict, claim_of, read_issuers
from streaming.frontier import Frontier
from streaming.log.protocol import Consumer, Entry, Log, Partition
from streaming.readable import readable
from streaming.records import WeightVersion

R = TypeVar("R")

GROUP = "generators"
"""Consumer group of all generators of a run: they share the partitions of `prompts`."""

POLL_S = 0.2
"""Longest wait in one read, in seconds: it bounds how long a commit or the end has to wait behind it."""


class _Threaded:
    """A consumer and the only thread that ever touches it."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="consumer")

    async def _do(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def close(self) -> None:
        await self._do(self._consumer.close)
        self._thread.shutdown()


class PromptReader(_Threaded):
    """Prompts of this generator's share, and which of them are settled.

    A partition that goes to another generator takes its open prompts with it: they are sampled there. A request that a
    scheduler wrote after its heir had taken over is settled unseen.
    """

    def __init__(self, log: Log, *, away_s: float = AWAY_S) -> None:
        super().__init__(log.subscribe(GROUP, [topics.PROMPTS.name]))
        self._log = log
        self._away_s = away_s
        self._heard_s = time.monotonic()
        self._frontiers: dict[Partition, Frontier] = {}
        self._open: set[tuple[Partition, int]] = set()
        self._next: dict[Partition, int] = {}
        self._committed: dict[Partition, int] = {}
        self._waiting: list[Entry] = []  # of a scheduler of which an heir is about to say where it has taken over
        self.num_refused = 0  # by the newest read

    async def read(self, *, max_records: int) -> list[Entry]:
        """Commit what was settled since, then the next prompts; empty after `POLL_S`."""
        num_wanted = max(1, max_records - len(self._waiting))
        asked_s = time.monotonic()  # before: this process may stand still with the answer in its hands
        entries, held, issuers = await self._do(lambda: self._commit_and_read(self._settled(), num_wanted))
        self._heard_s = asked_s
        for partition in set(self._frontiers) - held:
            self._forget(partition)
        for entry in entries:
            self._opened(entry)
        return self._counting([*self._waiting, *entries], issuers)

    async def confirm(self) -> None:
        """Give up the prompts that others answer by now: asked before an append, for this process may have stood still.

        Nothing is asked of the log where it was heard of less than `away_s` ago.
        """
        asked_s = time.monotonic()
        if asked_s - self._heard_s < self._away_s:
            return
        asked = {place: offset for frontier in self._frontiers.values() for place, offset in frontier.offsets().items()}
        lost = await self._do(lambda: self._lost(asked))
        self._heard_s = asked_s
        for partition in lost:
            if partition in self._frontiers:
                self._forget(partition)

    def is_open(self, entry: Entry) -> bool:
        """Whether this prompt is still ours to answer."""
        return ((entry.topic, entry.partition), entry.offset) in self._open

    def settle(self, entry: Entry) -> None:
        """The prompt's group is durable. It is not read again once the offset is committed."""
        partition = (entry.topic, entry.partition)
        self._open.remove((partition, entry.offset))
        self._frontiers[partition].settle(partition, entry.offset)

    async def lag(self) -> int:
        """Prompts of this share that are not settled: those that are not read, and those that are open."""
        behind = await self._do(self._consumer.behind)
        return sum(behind.values()) + len(self._open)

    async def close(self) -> None:
        """Commit what was settled and give the partitions back."""
        settled = self._settled()
        await self._do(lambda: self._commit(settled))
        await super().close()

    def _counting(self, read: list[Entry], issuers: Issuers) -> list[Entry]:
        """Those of the entries that are requests for sure, say the issuers, who were asked after they came."""
        found: dict[Verdict, list[Entry]] = {"counts": [], "void": [], "open": []}
        for entry in read:
            found[issuers.verdict(claim_of(entry), entry)].append(entry)
        for entry in found["void"]:
            self.settle(entry)
        self.num_refused, self._waiting = len(found["void"]), found["open"]
        return found["counts"]

    def _opened(self, entry: Entry) -> None:
        partition = (entry.topic, entry.partition)
        if entry.offset < self._next.get(partition, 0):
            self._forget(partition)  # lost and won back in between: it begins again where the group committed
        self._frontiers.setdefault(partition, Frontier()).read(partition, entry.offset)
        self._next[partition] = entry.offset + 1
        self._open.add((partition, entry.offset))

    def _forget(self, partition: Partition) -> None:
        del self._frontiers[partition], self._next[partition]
        self._committed.pop(partition, None)
        self._waiting = [entry for entry in self._waiting if (entry.topic, entry.partition) != partition]
        self._open = {(place, offset) for place, offset in self._open if place != partition}

    def _settled(self) -> dict[Partition, int]:
        offsets: dict[Partition, int] = {}
        for frontier in self._frontiers.values():
            offsets |= frontier.offsets()
        return {place: offset for place, offset in offsets.items() if self._committed.get(place) != offset}

    def _commit_and_read(
        self, settled: dict[Partition, int], max_records: int
    ) -> tuple[list[Entry], set[Partition], Issuers]:
        self._commit(settled)
        entries = self._consumer.read(max_records=max_records, timeout_s=POLL_S)
        issuers = read_issuers(self._log) if entries or self._waiting else Issuers()
        return entries, set(self._consumer.positions()), issuers

    def _lost(self, asked: dict[Partition, int]) -> list[Partition]:
        """Those of the partitions that are another generator's: it commits where all is settled, one by one."""
        lost = []
        for partition, offset in asked.items():
            try:
                self._consumer.commit({partition: offset})
            except LeaseLostError:
                lost.append(partition)
        return lost

    def _commit(self, settled: dict[Partition, int]) -> None:
        held = self._consumer.positions()
        offsets = {place: offset for place, offset in settled.items() if place in held}
        if not offsets:
            return
        try:
            self._consumer.commit(offsets)
        except LeaseLostError:
            return  # the next read gives up what is lost, and what is kept is committed after it
        self._committed |= offsets


class WeightsReader(_Threaded):
    """The versions of one policy, from those that were there when it was made."""

    def __init__(self, log: Log, policy: str) -> None:
        ends = log.end_offsets(topics.WEIGHTS.name)  # before `newest`: nothing may fall between
        super().__init__(log.assign(ends))
        self._policy = policy
        self._newest = self._pick(list(log.newest(topics.WEIGHTS.name).values()))

    async def next(self) -> WeightVersion:
        """The newest version, once there is one that was not returned before."""
        while self._newest is None:
            self._newest = self._pick(await self._do(lambda: self._consumer.read(max_records=256, timeout_s=POLL_S)))
        newest, self._newest = self._newest, None
        return newest

    def _pick(self, entries: list[Entry]) -> WeightVersion | None:
        found = readable(WeightVersion, entries)
        ours = [weights for weights in found if weights.policy == self._policy and weights.kind == "full"]
        return max(ours, key=lambda weights: weights.version, default=None)
