"""What candidates are worth, and by how much one is better than another."""

import math
from collections.abc import Sequence

from streaming.records import Implicit, Margins, SourceRewards

NOT_APPLICABLE = "not_applicable"
"""Why a source gave no value where it declined to judge: it said None, as for a prompt of another task."""

SAMPLED = "sampled"
"""Name of the implicit reward whose model is the one that sampled the candidate."""


def combined(rewards: Sequence[SourceRewards], num_candidates: int) -> list[float | None]:
    """The weighted sum of the sources per candidate; None where the candidate cannot be compared.

    Candidates are compared on the same sources only. A source that gave no candidate a value is left out for the
    whole group; a candidate that misses a source which others have is left out itself: nobody wins by missing one.
    A source of weight 0 is recorded and decides nothing.
    """
    sources = [source for source in rewards if source.weight and any(value is not None for value in source.values)]
    if not sources:
        return [None] * num_candidates
    return [_weighted(sources, candidate) for candidate in range(num_candidates)]


def measured(rewards: Sequence[SourceRewards], num_candidates: int) -> float | None:
    """The mean combined reward, for an evaluation; None where a whole source has failed.

    Without that source the mean would be on another scale than the same prompt's in other measurements. A source
    that declined to judge is left out: it declines for this prompt every time.
    """
    if any(source.weight and _has_failed(source) for source in rewards):
        return None
    values = [value for value in combined(rewards, num_candidates) if value is not None]
    return mean(values) if values else None


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def spread(values: Sequence[float]) -> float:
    """The standard deviation of these very values (not an estimate for a larger population); 0 where all are equal."""
    if min(values) == max(values):  # the mean of equal numbers is rounded, so the formula is not exactly 0
        return 0.0
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / len(values))


def between(chosen: int, rejected: int, rewards: Sequence[float | None], implicit: Sequence[Implicit]) -> Margins:
    """Chosen minus rejected: external in reward units, implicit as h(chosen) - h(rejected) of the model that sampled
    them, without beta."""
    h = next((source.h for source in implicit if source.model == SAMPLED), None)
    return Margins(
        external=_difference(rewards[chosen], rewards[rejected]),
        implicit=None if h is None else _difference(h[chosen], h[rejected]),
    )


def _has_failed(source: SourceRewards) -> bool:
    is_missing = all(value is None for value in source.values)
    return is_missing and any(reason != NOT_APPLICABLE for reason in source.reasons or [None])


def _weighted(sources: Sequence[SourceRewards], candidate: int) -> float | None:
    total = 0.0
    for source in sources:
        value = source.values[candidate]
        if value is None:
            return None
        total += source.weight * value
    return total


def _difference(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
