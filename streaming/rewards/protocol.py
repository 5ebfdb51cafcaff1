"""What every reward source promises. `tests/contract/test_rewards.py` holds each of them to it."""

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

from streaming.records import Group

MissingReason = Literal[
    "error",  # the source raised
    "timeout",  # it took longer than its deadline
    "wrong_count",  # it gave another number of rewards than there are candidates
    "wrong_type",  # what it gave is not a number
    "non_finite",  # NaN or infinite
    "not_applicable",  # it said None
    "too_long",  # longer than the reward model takes; it would have judged a truncated answer
    "no_chat_template",  # the reward model's tokenizer cannot write the conversation
]


class Reward(NamedTuple):
    """One candidate's reward: a finite value, or None and the reason. Exactly one of the two is None."""

    value: float | None
    reason: MissingReason | None = None


class RewardSource(Protocol):
    """Says what answers are worth. Safe to ask about many groups at once, from one event loop."""

    @property
    def name(self) -> str:
        """The name in records and metrics."""

    @property
    def version(self) -> str:
        """Changes with whatever decides the values: a function's code, a model's weights."""

    async def score(self, group: Group) -> list[Reward]:
        """One reward per candidate, in order.

        Never raises and never waits longer than the source's own deadline, once the call has begun: whatever goes
        wrong is a missing reward with its reason. It never blocks the event loop either.
        """

    def close(self) -> None:
        """Release threads and models; calls still under way are abandoned."""


def missing(reason: MissingReason, count: int) -> list[Reward]:
    """The same reason for every candidate."""
    return [Reward(None, reason)] * count


def checked(values: Iterable[Any]) -> list[Reward]:
    """Whatever a source returned, as rewards: numbers of any library stay, all else is missing with its reason."""
    return [_checked(value) for value in values]


def _checked(value: Any) -> Reward:
    if value is None:
        return Reward(None, "not_applicable")
    if isinstance(value, str | bytes):
        return Reward(None, "wrong_type")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return Reward(None, "wrong_type")
    return Reward(number) if math.isfinite(number) else Reward(None, "non_finite")
