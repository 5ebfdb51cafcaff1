"""How large a rating gap usually is: the unit in which the losses `rdpo`, `ripo` and `soft` see gaps. Pure.

Gaps are divided by it and never centred, for a small gap is still one in favour of the chosen response. It is part of
the checkpoint: a learner that goes on from there sees every later gap in the unit of one that never stopped.
"""

import math
from collections.abc import Iterable

import msgspec

NUM_NEWEST = 1000
"""Gaps over which the mean runs: dozens of batches, so that no single one moves the unit much."""


class GapScale(msgspec.Struct, frozen=True):
    """Exponentially forgetting mean of squared gaps, as its two sums; nothing was seen where `weights` is 0."""

    weights: float = 0.0
    squares: float = 0.0

    @property
    def value(self) -> float:
        """Root mean square of the newest gaps, in reward units; 1 before the first gap that is not zero."""
        return math.sqrt(self.squares / self.weights) if self.squares else 1.0

    def after(self, gaps: Iterable[float | None]) -> "GapScale":
        """With these gaps, newest last. A missing one, or one whose square is no number, changes nothing."""
        weights, squares = self.weights, self.squares
        for gap in gaps:
            if gap is not None and math.isfinite(gap * gap):
                weights = (1 - 1 / NUM_NEWEST) * weights + 1
                squares = (1 - 1 / NUM_NEWEST) * squares + gap * gap
        return GapScale(weights, squares)
