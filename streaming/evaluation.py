"""Held-out measurements from feedback: one weight version a measurement."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streaming.records import Feedback, Version
from streaming.selection.margins import mean

Key = tuple[int, Version]
"""(round, version)."""


@dataclass(frozen=True, order=True)
class Measurement:
    """The mean reward of a round's held-out prompts under one weight version."""

    round: int
    version: Version
    mean: float
    count: int  # prompts measured
    size: int  # prompts that the round has
    is_complete: bool


def measurements(feedback: Iterable[Feedback]) -> list[Measurement]:
    """Every round's measurement per version, by round and version.

    A prompt counts once, with its first evaluation: feedback repeats after a crash. A prompt whose answers span
    an update belongs to no version, so its round stays incomplete.
    """
    rewards: dict[Key, dict[int, float]] = {}
    sizes: dict[int, int] = {}
    for one in feedback:
        if one.ending != "evaluated" or one.round is None or one.version is None or one.mean_reward is None:
            continue
        rewards.setdefault((one.round, one.version), {}).setdefault(one.request_number, one.mean_reward)
        sizes[one.round] = one.round_size or 0
    return [measurement(key, list(values.values()), size=sizes[key[0]]) for key, values in sorted(rewards.items())]


def measurement(key: Key, rewards: Sequence[float], *, size: int) -> Measurement:
    """Of one round under one version, from a reward for each of its prompts that has one."""
    return Measurement(key[0], key[1], mean(rewards), len(rewards), size, len(rewards) == size)


def merit(measured: Measurement) -> tuple[float, int]:
    """What makes one measurement better than another: its mean; of equals, the earlier one."""
    return measured.mean, -measured.round


def best_of(measured: Iterable[Measurement]) -> Measurement | None:
    """The best complete measurement."""
    return max((one for one in measured if one.is_complete), key=merit, default=None)


def newest_of(measured: Iterable[Measurement]) -> Measurement | None:
    """The complete measurement of the newest round that has one."""
    return max((one for one in measured if one.is_complete), key=lambda one: (one.round, one.version), default=None)
