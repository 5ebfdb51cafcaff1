"""Who is chosen and who is rejected: arXiv 2502.16825 and its limits.

Each rule is a target: the rejected candidate is the one whose reward is nearest to it. For normal rewards the
candidate nearest to mu - 2 sigma IS the worst one for every N <= 8, in 96% of the groups at N = 16 and in 27% at
N = 64: the rules only part company from about N = 16.
"""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Literal

from streaming.records import Candidate
from streaming.selection.margins import mean, spread

Rule = Literal["max_min", "sweet_spot", "quantile"]


def distinct(candidates: Sequence[Candidate], usable: Sequence[int]) -> list[int]:
    """One index per different text, in order; of equal texts the first that ended by itself stays, else the first.

    Two candidates with the same text teach nothing against each other, whatever their rewards say.
    """
    kept: dict[str, int] = {}
    for index in usable:
        candidate = candidates[index]
        first = kept.setdefault(candidate.text, index)
        if candidate.has_eos and not candidates[first].has_eos:
            kept[candidate.text] = index
    return sorted(kept.values())


def target(rewards: Sequence[float], rule: Rule, *, num_sigmas: float, quantile: float) -> float:
    """The reward that a rejected candidate should have, from ALL rewards of this one group, duplicates included.

    max_min: the least. sweet_spot: mu - num_sigmas sigma. quantile: the same idea for rewards that are not normal
    (2.3% is where mu - 2 sigma of a normal distribution lies).
    """
    if rule == "max_min":
        return min(rewards)
    if rule == "sweet_spot":
        return mean(rewards) - num_sigmas * spread(rewards)
    return quantile_of(rewards, quantile)


def choose(rewards: Mapping[int, float], ended: Container[int]) -> int:
    """The best candidate. Among equals one that ended by itself, then the first: always the same one."""
    return max(rewards, key=lambda index: (rewards[index], index in ended, -index))


def reject(rewards: Mapping[int, float], chosen: int, aim: float) -> int | None:
    """The candidate nearest to `aim` that is worse than the chosen one; an equal one only where none is worse.

    Without that preference a 0/1 reward with few zeros makes ties: the ones lie nearer to mu - 2 sigma than the
    zeros do. Among equally near ones the worse, then the first. None where the chosen one is alone.
    """
    others = [index for index in rewards if index != chosen]
    best = rewards[chosen]
    return min(
        others,
        key=lambda index: (rewards[index] >= best, abs(rewards[index] - aim), rewards[index], index),
        default=None,
    )


def quantile_of(values: Sequence[float], share: float) -> float:
    """The quantile, linear between neighbours: share 0 is the least value, 1 the greatest."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
