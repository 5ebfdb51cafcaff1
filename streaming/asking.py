"""Asks the reward sources and the reference model about many groups at once, none waiting for another.

Knows groups and threads; knows no log. Sources are asked from one event loop in a thread of its own, the reference
works in another one on batches that cross the groups' borders.

    open (context manager) -> submitted -> answered (taken in whatever order they get ready) -> closed
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import NamedTuple, Protocol

from streaming.errors import RecordError
from streaming.log.protocol import Entry
from streaming.records import Group, SourceRewards
from streaming.rewards import WeightedSource
from streaming.rewards.workers import Coalescer, LoopThread

_PROBE: tuple[list[int], list[int]] = ([0], [0])
"""An example that every language model can price."""


class Reference(Protocol):
    """What is needed of the reference model. Called from one thread."""

    @property
    def version(self) -> str: ...

    def logprobs(self, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]: ...

    def price(self, groups: Sequence[Group]) -> list[list[float]]: ...


class Answers(NamedTuple):
    """What everybody said about a group."""

    rewards: list[SourceRewards]
    logprobs: list[float] | None  # of the reference; None for an evaluation request
    further: list[list[float] | None] = []  # of each further reference; None where it cannot price this group


class Answered(NamedTuple):
    """A group, where it came from, and what was said; or why nothing can be said about it."""

    entry: Entry
    group: Group
    answers: Answers | RecordError


Price = Callable[[Group], Awaitable[list[float]]]
"""Asks a reference for log pi_ref of every candidate. Raises RecordError where it cannot price this group."""


class Panel:
    """All that is asked about a group. Owns the sources: they close with it."""

    def __init__(self, sources: Sequence[WeightedSource], references: Sequence[Reference], *, max_groups: int) -> None:
        """The first of `references` is that of the policy that samples: what it cannot price is a bad record."""
        self._sources = sources
        self._ready: SimpleQueue[Answered | BaseException] = SimpleQueue()
        self._loop = LoopThread(name="panel")
        self._pricing = [
            Coalescer(partial(_price, reference), name="reference", max_items=max_groups) for reference in references
        ]

    def submit(self, entry: Entry, group: Group) -> None:
        """Begin to ask; the answers come out of `take`, once."""
        self._loop.begin(self._answer(entry, group))

    def take(self, timeout_s: float) -> list[Answered]:
        """What is ready, at least one if that happens within `timeout_s`.

        Raises what makes all asking impossible: the reference model failed, and fails on anything else as well.
        """
        taken: list[Answered] = []
        try:
            while True:
                ready = self._ready.get(timeout=timeout_s) if not taken else self._ready.get_nowait()
                if isinstance(ready, BaseException):
                    raise ready
                taken.append(ready)
        except Empty:
            return taken

    def close(self) -> None:
        """Abandon what is under way."""
        self._loop.close()
        for pricing in self._pricing:
            pricing.close()
        for weighted in self._sources:
            weighted.source.close()

    def __enter__(self) -> "Panel":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _answer(self, entry: Entry, group: Group) -> None:
        try:
            answers: Answers | RecordError = await ask(group, self._sources, self._prices)
        except RecordError as error:
            answers = error
        except Exception as error:
            self._ready.put(error)
            return
        self._ready.put(Answered(entry, group, answers))

    @property
    def _prices(self) -> list[Price]:
        return [partial(_priced, pricing) for pricing in self._pricing]


async def _priced(pricing: Coalescer[Group, list[float]], group: Group) -> list[float]:
    return await asyncio.wrap_future(pricing.submit(group))


def _price(reference: Reference, groups: list[Group]) -> list[list[float]]:
    """A group on which a working model fails is a bad record; a model that fails on everything is no record's."""
    try:
        return reference.price(groups)
    except RecordError:
        raise
    except Exception as cause:
        if len(groups) > 1:
            raise  # each is tried alone next
        reference.logprobs([_PROBE])
        raise RecordError(
            f"the reference model failed on it: {type(cause).__name__}: {cause}",
            where=f"group {groups[0].group_id}",
            do="It goes to the dead-letter topic. Where memory was short, lower scoring.batch_tokens.",
        ) from cause


async def ask(group: Group, sources: Sequence[WeightedSource], prices: Sequence[Price]) -> Answers:
    """Ask all sources, and for a training request the references, at once; done when the last has answered."""
    asked = [asyncio.ensure_future(_ask(source, group)) for source in sources]
    if group.request.purpose == "eval":
        return Answers(list(await asyncio.gather(*asked)), None)
    first, *others = prices
    further = [asyncio.ensure_future(_unless_bad(price, group)) for price in others]
    logprobs = await first(group)
    return Answers(list(await asyncio.gather(*asked)), logprobs, list(await asyncio.gather(*further)))


async def _unless_bad(price: Price, group: Group) -> list[float] | None:
    """A further policy whose reference cannot price a group learns nothing from it; the others do."""
    try:
        return await price(group)
    except RecordError:
        return None


async def _ask(asked: WeightedSource, group: Group) -> SourceRewards:
    rewards = await asked.source.score(group)
    reasons: list[str | None] = [reward.reason for reward in rewards]
    return SourceRewards(
        source=asked.source.name,
        weight=asked.weight,
        values=[reward.value for reward in rewards],
        reasons=reasons if any(reasons) else [],
        version=asked.source.version,
    )
