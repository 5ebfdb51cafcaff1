"""How far ahead prompts may run, and which prompt comes next. Values in, values out: no log, no clock, no threads.

    issued -> some of its examples ended -> all of them ended: its slot is free

A crash loses nothing of this: the same calls in the order of the log rebuild it.
"""

import random
from dataclasses import dataclass, field

from streaming.audit import SUPERSEDED
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
    """Which requests were issued and have not ended."""

    def __init__(self) -> None:
        self.next_number = 0
        self.next_ordinal = 0
        self._train: dict[int, set[int]] = {}  # request number -> the examples of it that have ended
        self._eval: set[int] = set()

    def go_on(self, next_number: int, next_ordinal: int) -> None:
        """Everything before these was issued, even where the log no longer shows it."""
        self.next_number = max(self.next_number, next_number)
        self.next_ordinal = max(self.next_ordinal, next_ordinal)

    def issue(self, request: PromptRequest) -> None:
        """A request is durable in the log."""
        self.next_number = max(self.next_number, request.number + 1)
        if request.purpose == "eval":
            self._eval.add(request.number)
            return
        ordinal = self.next_ordinal if request.ordinal is None else request.ordinal
        self.next_ordinal = max(self.next_ordinal, ordinal + 1)
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

    def room(self, pipeline_depth: int, total: int | None) -> int:
        """How many training requests may be issued now."""
        free = max(0, pipeline_depth - self.num_train)
        return free if total is None else min(free, max(0, total - self.next_ordinal))

    def is_exhausted(self, total: int | None) -> bool:
        """Every training request of the data was issued."""
        return total is not None and self.next_ordinal >= total
