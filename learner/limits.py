"""Which pairs the model can take at all. Values in, reason out."""

import math
from typing import NamedTuple

from streaming.endings import FORGOTTEN
from streaming.records import Pair


class Limits(NamedTuple):
    """What one example may be."""

    max_length: int | None  # prompt plus response tokens; None: any
    vocabulary_size: int

    def refuse(self, pair: Pair) -> str | None:
        """The reason why this pair cannot be trained on, or None."""
        if not pair.prompt_tokens and not pair.chosen.tokens:
            return FORGOTTEN
        sides = [pair.chosen, *([pair.rejected] if pair.rejected else [])]
        longest = len(pair.prompt_tokens) + max(len(side.tokens) for side in sides)
        if self.max_length is not None and longest > self.max_length:
            return "too_long"
        tokens = [*pair.prompt_tokens, *(token for side in sides for token in side.tokens)]
        if not pair.prompt_tokens or not 0 <= min(tokens) <= max(tokens) < self.vocabulary_size:
            return "bad_tokens"
        if not all(math.isfinite(side.reference_logprob) for side in sides):
            return "reference"
        return None
