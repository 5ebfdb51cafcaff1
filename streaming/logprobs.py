"""The one place where log-probs are gathered: what a causal language model gives to tokens that are already there.

Knows tokens and models, not records. The scorer's reference and the learner both come here, so that their numbers
mean the same: float32 log-softmax of the raw logits (no temperature), every response token conditioned on the
prompt and the response before it.

Shapes: B sequences, T columns of the padded input (the last token of the longest sequence predicts nothing and is
left out), K kept columns at its end (those that predict a response token of at least one sequence), N response
tokens in all, V vocabulary. Padding is on the right: in a causal model a real token never sees it, so no attention
mask is needed, positions count from 0 by default, and attention takes its fast path.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from streaming.errors import DataError

Example = tuple[Sequence[int], Sequence[int]]
"""Prompt tokens and response tokens."""

_FILLER_TOKEN = 0
"""Stands in padding. Any token would do: nothing real sees it and no log-prob of it is kept."""


class TokenBatch(NamedTuple):
    """Sequences ready for one forward pass."""

    input_BT: Tensor
    targets_BK: Tensor  # the token that each kept column predicts
    is_response_BK: Tensor  # whether it is a response token of that sequence

    @property
    def num_kept(self) -> int:
        return int(self.targets_BK.shape[1])


class ResponseLogprobs(NamedTuple):
    """Log-probs of response tokens where `is_response_BK`, 0 elsewhere; a row's tokens are in their order."""

    logprobs_BK: Tensor
    is_response_BK: Tensor

    @property
    def sums_B(self) -> Tensor:
        """log pi(y|x): summed over each response."""
        return self.logprobs_BK.sum(dim=1)

    @property
    def lengths_B(self) -> Tensor:
        """Response tokens of each sequence."""
        return self.is_response_BK.sum(dim=1)


def pad(examples: Sequence[Example], device: torch.device | str = "cpu") -> TokenBatch:
    """Lay sequences into one right-padded batch. An empty response is allowed (its sum is 0), an empty prompt is not.

    Raises DataError where a prompt has no tokens: nothing would predict the first token of its response.
    """
    if not all(prompt for prompt, _ in examples):
        raise DataError(
            "a prompt has no tokens", where="streaming.logprobs", do="Give every prompt at least one token."
        )
    num_columns = max(len(prompt) + len(response) for prompt, response in examples)
    first_kept = min(len(prompt) for prompt, _ in examples) - 1
    tokens_BT = torch.full((len(examples), num_columns), _FILLER_TOKEN)
    is_response_BT = torch.zeros((len(examples), num_columns), dtype=torch.bool)
    for row, (prompt, response) in enumerate(examples):
        length = len(prompt) + len(response)
        tokens_BT[row, :length] = torch.tensor([*prompt, *response])
        is_response_BT[row, len(prompt) : length] = True
    return TokenBatch(
        input_BT=tokens_BT[:, : max(1, num_columns - 1)].to(device),
        targets_BK=tokens_BT[:, first_kept + 1 :].to(device),
        is_response_BK=is_response_BT[:, first_kept + 1 :].to(device),
    )


def forward_logprobs(model: Any, batch: TokenBatch) -> ResponseLogprobs:
    """One forward pass; differentiable. `model` is a Hugging Face causal language model or an engine around one.

    Logits are computed for the kept columns only, and turned to float32 for the response tokens only.
    """
    if batch.num_kept == 0:
        return ResponseLogprobs(torch.zeros(batch.targets_BK.shape), batch.is_response_BK)
    logits_NV = _kept_logits(model, batch)[batch.is_response_BK].float()
    nll_N = F.cross_entropy(logits_NV, batch.targets_BK[batch.is_response_BK], reduction="none")
    logprobs_BK = torch.zeros(batch.targets_BK.shape, device=nll_N.device).masked_scatter(batch.is_response_BK, -nll_N)
    return ResponseLogprobs(logprobs_BK, batch.is_response_BK)


def response_logprobs(model: Any, examples: Sequence[Example]) -> ResponseLogprobs:
    """Differentiable log-probs of the response tokens of these examples, in one forward pass."""
    return forward_logprobs(model, pad(examples, _device(model)))


def sequence_logprobs(model: Any, examples: Sequence[Example]) -> list[list[float]]:
    """Log-probs of each example's response tokens, in one forward pass and without gradients.

    The caller bounds the batch and puts sequences of like length together.
    """
    with torch.no_grad():
        gathered = response_logprobs(model, examples)
    flat = gathered.logprobs_BK[gathered.is_response_BK].tolist()
    lengths = [len(response) for _, response in examples]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def _kept_logits(model: Any, batch: TokenBatch) -> Tensor:
    arguments = {"input_ids": batch.input_BT, "use_cache": False}
    if "logits_to_keep" in inspect.signature(getattr(model, "module", model).forward).parameters:
        logits: Tensor = model(**arguments, logits_to_keep=batch.num_kept).logits
    else:
        logits = model(**arguments).logits
    return logits[:, -batch.num_kept :]


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device
