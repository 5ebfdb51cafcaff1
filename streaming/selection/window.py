"""What the newest groups look like: shares of the routes, the mean margin, and whether the two margins agree."""

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from streaming.records import Route
from streaming.selection.margins import mean

ROUTES: tuple[Route, ...] = ("dpo", "sft", "drop")


class Outcome(NamedTuple):
    """A group's route and, of a pair, its margins."""

    route: Route
    external: float | None = None
    implicit: float | None = None


class Window:
    """The newest `size` groups; older ones are forgotten."""

    def __init__(self, size: int) -> None:
        self._outcomes: deque[Outcome] = deque(maxlen=size)

    def add(self, outcome: Outcome) -> None:
        """Take in a group."""
        self._outcomes.append(outcome)

    def shares(self) -> dict[Route, float]:
        """The share of each route; 0 of all without groups."""
        routes = [outcome.route for outcome in self._outcomes]
        return {route: routes.count(route) / max(1, len(routes)) for route in ROUTES}

    def mean_margin(self) -> float | None:
        """The mean external margin of the pairs; None without any."""
        margins = [outcome.external for outcome in self._outcomes if outcome.external is not None]
        return mean(margins) if margins else None

    def correlation(self) -> float | None:
        """Pearson's r of the external and the implicit margin; None below two pairs or where one of them is constant.

        Weak on every preference set of arXiv 2502.14560; before the policy has moved the implicit one is 0.
        """
        both = [(o.external, o.implicit) for o in self._outcomes if o.external is not None and o.implicit is not None]
        return pearson([external for external, _ in both], [implicit for _, implicit in both])


def pearson(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Pearson's correlation of two series of one length; None where it is not defined."""
    if len(left) < 2:
        return None
    mean_left, mean_right = mean(left), mean(right)
    from_left = [value - mean_left for value in left]
    from_right = [value - mean_right for value in right]
    scale = math.sqrt(math.fsum(x * x for x in from_left) * math.fsum(y * y for y in from_right))
    return math.fsum(x * y for x, y in zip(from_left, from_right, strict=True)) / scale if scale else None
