"""How far ahead prompts may run, and which prompt comes next. Values in, values out: no log, no clock, no threads.

    issued -> some of its examples ended -> all of them ended: its slot is free

A crash loses nothing of this: the same calls in the order of the log rebuild it.
"""

import random
from dataclasses import dataclass, field
from itertools import islice

from streaming.audit import SUPERSEDED
from streaming.frontier import IntervalSet
from streaming.records import Feedback, PromptRequest, stable_id


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of the training prompts: a function of the seed alone, so a restart goes on where it stopped."""

    num_prompts: int
    seed: int | None
    total: int | None
    """Training requests in all; None: for ever."""

    _passes: dict[int, list[int]] = field(default_factory=dict, compare=False, repr=False)

    def index(self, ordinal: int) -> int:
        """The prompt of training request number `ordinal` (counting training requests only)."""
        pass_number, place = divmod(ordinal, self.num_prompts)
        if self.seed is None:
            return place
        if pass_number not in self._passes:
            self._passes.clear()  # requests only move forward: one pass is ever needed
            self._passes[pass_number] = shuffled(self.num_prompts, self.seed, pass_number)
        return self._passes[pass_number][place]


def shuffled(num_prompts: int, seed: int, pass_number: int) -> list[int]:
    """Every index once, in an order that is the same on every machine."""
    order = list(range(num_prompts))
    random.Random(stable_id("order", seed, pass_number)).shuffle(order)
    return order


def total_requests(num_prompts: int, max_passes: float | None, max_requests: int | None) -> int | None:
    """Training requests until the data ends: the smaller of the two limits, at least one; None without a limit."""
    limits = [] if max_passes is None else [max(1, round(num_prompts * max_passes))]
    limits += [] if max_requests is None else [max_requests]
    return min(limits, default=None)


class Outstanding:
    """Which requests were issued, and which of them have not ended.

    A request that was lost on its way to a cluster, where others of the same append became durable, leaves a number
    and an ordinal free: the next requests take the lowest that are free.
    """

    def __init__(self) -> None:
        self._numbers = IntervalSet()  # issued
        self._ordinals = IntervalSet()
        self._train: dict[int, set[int]] = {}  # request number -> the examples of it that have ended
        self._eval: set[int] = set()

    def go_on(self, numbers: IntervalSet, ordinals: IntervalSet) -> None:
        """These were issued, even where the log no longer shows it."""
        self._numbers = IntervalSet([*self._numbers.intervals, *numbers.intervals])
        self._ordinals = IntervalSet([*self._ordinals.intervals, *ordinals.intervals])

    def leave_no_gaps(self) -> None:
        """Call every number issued that is below another one: where nobody can say what retention has taken."""
        self._numbers, self._ordinals = filled(self._numbers), filled(self._ordinals)

    def issue(self, request: PromptRequest) -> None:
        """A request is durable in the log."""
        self._numbers.add(request.number)
        if request.purpose == "eval":
            self._eval.add(request.number)
            return
        self._ordinals.add(self.free_ordinals(1)[0] if request.ordinal is None else request.ordinal)
        self._train[request.number] = set()

    def end(self, feedback: Feedback) -> bool:
        """An example ended (`consumed` frees the slot too). True where it was the last one of its request.

        Hearing the same ending again, or of a request that is not outstanding, changes nothing; nor does a second
        content of a group (`superseded`), whose first content is still on its way.
        """
        number = feedback.request_number
        if feedback.ending == "redriven":
            self._reopen(feedback)
            return False
        if feedback.ending == "dropped" and feedback.reason == SUPERSEDED:
            return False
        if number in self._eval:
            self._eval.discard(number)
            return True
        if number not in self._train:
            return False
        ended = self._train[number]
        ended.add(feedback.index)
        if len(ended) < feedback.num_examples:
            return False
        del self._train[number]
        return True

    def forget(self, number: int) -> None:
        """It has ended, by what was carried forward from before retention."""
        self._train.pop(number, None)
        self._eval.discard(number)

    def _reopen(self, feedback: Feedback) -> None:
        """A dead letter of it was sent again: it is outstanding once more, even beyond the depth, until it ends."""
        if feedback.round is None:
            self._train.setdefault(feedback.request_number, set())

    @property
    def num_train(self) -> int:
        return len(self._train)

    @property
    def num_eval(self) -> int:
        return len(self._eval)

    @property
    def num_issued(self) -> int:
        """Training requests."""
        return len(self._ordinals)

    def free_numbers(self, num: int) -> list[int]:
        """The numbers of the next so many requests."""
        return list(islice(self._numbers.missing(), num))

    def free_ordinals(self, num: int, total: int | None = None) -> list[int]:
        """The ordinals of the next so many training requests; fewer, where the data end."""
        lowest = islice(self._ordinals.missing(), num)
        return [ordinal for ordinal in lowest if total is None or ordinal < total]

    def room(self, pipeline_depth: int, total: int | None) -> int:
        """How many training requests may be issued now."""
        return len(self.free_ordinals(max(0, pipeline_depth - self.num_train), total))

    def is_exhausted(self, total: int | None) -> bool:
        """Every training request of the data was issued."""
        return not self.free_ordinals(1, total)


def filled(numbers: IntervalSet) -> IntervalSet:
    """The same without its gaps, from 0 on."""
    return IntervalSet([(0, max((end for _, end in numbers.intervals), default=0))])
