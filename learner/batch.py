"""A step's examples to micro-batches: who trains what, in what order, padded to what. Pure but for the last step.

    Pair -> Example (what the loss needs) -> shares of the ranks -> micro-batches by token budget -> tensors

Every rank plans alike from the same examples, so nobody has to be told its part, and every rank gets the same number
of micro-batches (DeepSpeed's collectives happen once in each): a rank that has fewer runs empty ones.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from streaming.logprobs import TokenBatch, pad
from streaming.records import Pair
from streaming.token_batches import padded_batches


class Example(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of a pair that becomes a gradient. Travels between ranks as msgpack."""

    prompt_tokens: list[int]
    chosen_tokens: list[int]
    rejected_tokens: list[int] | None = None  # None on the sft route
    reference_chosen: float = 0.0  # summed log-probs
    reference_rejected: float = 0.0
    rating_gap: float | None = None
    weight: float = 1.0

    @property
    def num_sequences(self) -> int:
        return 1 if self.rejected_tokens is None else 2

    @property
    def max_tokens(self) -> int:
        """Prompt plus the longer response."""
        return len(self.prompt_tokens) + max(len(self.chosen_tokens), len(self.rejected_tokens or ()))


def example_of(pair: Pair) -> Example:
    """What training needs of a pair."""
    rejected = None if pair.route == "sft" else pair.rejected
    return Example(
        prompt_tokens=pair.prompt_tokens,
        chosen_tokens=pair.chosen.tokens,
        rejected_tokens=None if rejected is None else rejected.tokens,
        reference_chosen=pair.chosen.reference_logprob,
        reference_rejected=0.0 if rejected is None else rejected.reference_logprob,
        rating_gap=pair.rating_gap,
        weight=pair.weight,
    )


def plan(examples: Sequence[Example], *, world_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Indices into `examples`, by rank and micro-batch; every rank has the same number of micro-batches.

    Examples are sorted by length and dealt out in turn, so the ranks' work is alike and little is padded. A micro-batch
    holds at most `max_tokens` padded tokens, or a single example.
    """
    order = sorted(range(len(examples)), key=lambda i: -examples[i].max_tokens)
    ranks = [_batches(examples, order[rank::world_size], max_tokens) for rank in range(world_size)]
    most = max(map(len, ranks))
    return [batches + [[]] * (most - len(batches)) for batches in ranks]


def _batches(examples: Sequence[Example], share: Sequence[int], max_tokens: int) -> list[list[int]]:
    lengths = [examples[i].max_tokens for i in share]
    counts = [examples[i].num_sequences for i in share]
    return [[share[place] for place in batch] for batch in padded_batches(lengths, max_tokens, counts=counts)]


class MicroBatch(NamedTuple):
    """B examples as tensors; their sequences lie in one padded batch: all chosen first, then every rejected."""

    tokens: TokenBatch
    rejected_of_B: Tensor  # row of the example's rejected response; 0 where there is none
    is_pair_B: Tensor
    reference_chosen_B: Tensor
    reference_rejected_B: Tensor
    gap_B: Tensor  # NaN where there is none
    weight_B: Tensor
    num_examples: int  # 0 for an empty micro-batch, which still holds one weightless sequence
    num_tokens: int  # without padding


EMPTY = Example(prompt_tokens=[0], chosen_tokens=[0], weight=0.0)
"""What a rank without work runs: one sequence whose loss counts nothing."""


def to_tensors(examples: Sequence[Example], device: torch.device | str = "cpu") -> MicroBatch:
    """The examples of one micro-batch as tensors; an empty one becomes a forward pass without effect."""
    rows = list(examples) or [EMPTY]
    pairs = [i for i, example in enumerate(rows) if example.rejected_tokens is not None]
    chosen = [(example.prompt_tokens, example.chosen_tokens) for example in rows]
    rejected = [(rows[i].prompt_tokens, rows[i].rejected_tokens or []) for i in pairs]
    rejected_of = {i: len(rows) + row for row, i in enumerate(pairs)}

    def numbers(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    return MicroBatch(
        tokens=pad(chosen + rejected, device),
        rejected_of_B=torch.tensor([rejected_of.get(i, 0) for i in range(len(rows))], device=device),
        is_pair_B=torch.tensor([i in rejected_of for i in range(len(rows))], device=device),
        reference_chosen_B=numbers([example.reference_chosen for example in rows]),
        reference_rejected_B=numbers([example.reference_rejected for example in rows]),
        gap_B=numbers([math.nan if example.rating_gap is None else example.rating_gap for example in rows]),
        weight_B=numbers([example.weight for example in rows]),
        num_examples=len(examples),
        num_tokens=sum(len(prompt) + len(response) for prompt, response in chosen + rejected) if examples else 0,
    )
