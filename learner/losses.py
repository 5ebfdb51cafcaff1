"""Training losses: pure functions of log-probs. No model, no settings object, no I/O.

Shapes: B examples. A `Side` is one response of each example: `policy_B` and `reference_B` are log pi_theta(y|x) and
log pi_ref(y|x), summed over the response's tokens (end of sequence included where the model produced it, prompt
excluded), `length_B` its tokens. So `h(y) = policy - reference`, the margin is `d = h(y_w) - h(y_l)`, and the
mean-token negative log-likelihood is `-policy / length`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Side(NamedTuple):
    """The chosen or the rejected responses of B examples."""

    policy_B: Tensor
    reference_B: Tensor
    length_B: Tensor

    @property
    def h_B(self) -> Tensor:
        """log pi_theta(y|x) - log pi_ref(y|x)."""
        return self.policy_B - self.reference_B

    @property
    def nll_B(self) -> Tensor:
        """Mean-token negative log-likelihood; 0 for a response without tokens."""
        return -self.policy_B / self.length_B.clamp(min=1)


class Signals(NamedTuple):
    """What selection knows about each pair beside its log-probs."""

    gap_B: Tensor  # external rating gap; NaN where there is none


Preference = Callable[[Side, Side, Signals, float], Tensor]
"""(chosen, rejected, signals, beta) -> a loss per pair."""


def dpo(chosen: Side, rejected: Side, signals: Signals, beta: float) -> Tensor:
    """-log sigmoid(beta d), the sigmoid form of DPO (arXiv 2305.18290). Ignores the signals."""
    return -F.logsigmoid(beta * (chosen.h_B - rejected.h_B))


PREFERENCES: dict[str, Preference] = {"dpo": dpo}


def example_losses(
    chosen: Side,
    rejected: Side,
    signals: Signals,
    *,
    is_pair_B: Tensor,
    weight_B: Tensor,
    preference: Preference,
    beta: float,
    nll_weight: float,
    sft_weight: float,
) -> Tensor:
    """The loss of each example of a batch that mixes both routes, times the example's own weight.

    A pair: preference + nll_weight * NLL(y_w). An SFT example, which has no rejected: sft_weight * NLL(y_w); whatever
    finite numbers stand in its rejected side have no effect, not even on gradients.
    """
    pair_B = preference(chosen, rejected, signals, beta) + nll_weight * chosen.nll_B
    return weight_B * torch.where(is_pair_B, pair_B, sft_weight * chosen.nll_B)
