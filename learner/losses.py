"""Training losses: pure functions of log-probs. No model, no settings object, no I/O.

Shapes: B examples. A `Side` is one response of each example: `policy_B` and `reference_B` are log pi_theta(y|x) and
log pi_ref(y|x), summed over the response's tokens (end of sequence included where the model produced it, prompt
excluded), `length_B` its tokens. So `h(y) = policy - reference`, the margin is `d = h(y_w) - h(y_l)`, and the
mean-token negative log-likelihood is `-policy / length`.

Two names of the literature differ by case alone. Here `robust` is rDPO (labels flipped by noise), and `rdpo` is RDPO
(the rating gap asks for a margin).
"""

from collections.abc import Callable
from functools import partial
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

    gap_B: Tensor  # external rating gap, in reward units; NaN where there is none
    gap_scale: float = 1.0  # running root mean square of the gaps, in reward units

    @property
    def is_rated_B(self) -> Tensor:
        return ~torch.isnan(self.gap_B)

    @property
    def known_gap_B(self) -> Tensor:
        """0 where there is none, so that no NaN comes near a gradient; whoever uses it decides what that means."""
        return torch.where(self.is_rated_B, self.gap_B, 0.0)

    @property
    def scaled_gap_B(self) -> Tensor:
        """In typical gaps, never centred: less than the mean gap is still a gap in favour of the chosen response."""
        return self.known_gap_B / self.gap_scale


Preference = Callable[[Side, Side, Signals], Tensor]
"""(chosen, rejected, signals) -> a loss per pair."""


def _reward_margin_B(chosen: Side, rejected: Side, beta: float) -> Tensor:
    """beta d: the margin in implicit reward, in nats."""
    return beta * (chosen.h_B - rejected.h_B)


def dpo(chosen: Side, rejected: Side, signals: Signals, *, beta: float) -> Tensor:
    """-log sigmoid(beta d), the sigmoid form of DPO (arXiv 2305.18290). Ignores the signals."""
    return -F.logsigmoid(_reward_margin_B(chosen, rejected, beta))


def cdpo(chosen: Side, rejected: Side, signals: Signals, *, beta: float, eps: float) -> Tensor:
    """-(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d): conservative DPO.

    Mitchell, "A note on DPO with noisy preferences" (ericmitchell.ai/cdpo.pdf). The best margin is finite:
    beta d = log((1 - eps) / eps).
    """
    margin_B = _reward_margin_B(chosen, rejected, beta)
    return -(1 - eps) * F.logsigmoid(margin_B) - eps * F.logsigmoid(-margin_B)


def robust(chosen: Side, rejected: Side, signals: Signals, *, beta: float, eps: float, max_margin: float) -> Tensor:
    """[-(1 - eps) log sigmoid(m) + eps log sigmoid(-m)] / (1 - 2 eps): rDPO (arXiv 2403.00409), m = beta d.

    Its mean over labels that are flipped with probability eps is DPO's loss with the true labels. The formula falls
    without end as m grows; here m counts up to `max_margin`, from where on the loss is flat.
    """
    margin_B = _reward_margin_B(chosen, rejected, beta).clamp(max=max_margin)
    return (-(1 - eps) * F.logsigmoid(margin_B) + eps * F.logsigmoid(-margin_B)) / (1 - 2 * eps)


def ipo(chosen: Side, rejected: Side, signals: Signals, *, beta: float) -> Tensor:
    """(d - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17), of summed log-probs as in the paper.

    TRL divides each h by its response's length first: for responses of one token the two are the same.
    """
    return (chosen.h_B - rejected.h_B - 1 / (2 * beta)).square()


def slic(chosen: Side, rejected: Side, signals: Signals, *, beta: float) -> Tensor:
    """max(0, 1 - beta d): SLiC's hinge (arXiv 2305.10425) on margins against the reference (arXiv 2309.06657)."""
    return torch.relu(1 - _reward_margin_B(chosen, rejected, beta))


def simpo(chosen: Side, rejected: Side, signals: Signals, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma): SimPO (arXiv 2405.14734).

    It knows no reference.
    """
    return -F.logsigmoid(beta * (rejected.nll_B - chosen.nll_B) - gamma)


def soft(chosen: Side, rejected: Side, signals: Signals, *, beta: float, sharpness: float) -> Tensor:
    """-p log sigmoid(beta d) - (1 - p) log sigmoid(-beta d), p = sigmoid(sharpness * gap) (arXiv 2409.19605).

    The gap is in typical gaps. A pair without a rating keeps its hard label: p = 1, which is DPO.
    """
    margin_B = _reward_margin_B(chosen, rejected, beta)
    p_B = torch.where(signals.is_rated_B, torch.sigmoid(sharpness * signals.scaled_gap_B), 1.0)
    return -p_B * F.logsigmoid(margin_B) - (1 - p_B) * F.logsigmoid(-margin_B)


def rdpo(chosen: Side, rejected: Side, signals: Signals, *, beta: float, beta_1: float) -> Tensor:
    """-log sigmoid(beta d - (beta / beta_1) gap): a larger rating gap asks for a larger margin (arXiv 2602.00603).

    The gap is in typical gaps. A missing rating is not a gap of zero: that pair falls back to DPO, and the learner
    counts it. The offset happens to be the same, the meaning is not: beta_1 -> inf is DPO too.
    """
    offset_B = beta / beta_1 * signals.scaled_gap_B
    return -F.logsigmoid(_reward_margin_B(chosen, rejected, beta) - offset_B)


def ripo(chosen: Side, rejected: Side, signals: Signals, *, beta: float, beta_1: float) -> Tensor:
    """(beta d - (beta / beta_1) gap - 1/2)^2 (arXiv 2602.00603); beta_1 -> inf is beta^2 times `ipo`.

    The gap is in typical gaps. A pair without a rating falls back to that limit, and the learner counts it.
    """
    offset_B = beta / beta_1 * signals.scaled_gap_B
    return (_reward_margin_B(chosen, rejected, beta) - offset_B - 0.5).square()


def ml_rdpo(
    chosen: Side, rejected: Side, signals: Signals, *, beta: float, variance: float, logit_scale: float
) -> Tensor:
    """-log sigmoid(beta d) + (gap - beta d)^2 / (2 variance) (arXiv 2602.00603): maximum likelihood of label and gap.

    The gap is in Bradley-Terry logits: reward units over `logit_scale`, not over the running scale of the others.
    variance -> inf is DPO, variance -> 0 distilled DPO. A pair without a rating has no squared term.
    """
    margin_B = _reward_margin_B(chosen, rejected, beta)
    squared_B = (signals.known_gap_B / logit_scale - margin_B).square() / (2 * variance)
    return -F.logsigmoid(margin_B) + torch.where(signals.is_rated_B, squared_B, 0.0)


PREFERENCES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss for loss in (dpo, cdpo, robust, ipo, slic, simpo, soft, rdpo, ripo, ml_rdpo)
}
"""By the name in the settings; `learner.config.COEFFICIENTS` holds the keywords of each beside beta."""


def preference_of(name: str, **coefficients: float) -> Preference:
    """A loss with its coefficients: beta, and the others that its formula names."""
    return partial(PREFERENCES[name], **coefficients)


def example_losses(
    chosen: Side,
    rejected: Side,
    signals: Signals,
    *,
    is_pair_B: Tensor,
    weight_B: Tensor,
    preference: Preference,
    nll_weight: float,
    sft_weight: float,
) -> Tensor:
    """The loss of each example of a batch that mixes both routes, times the example's own weight.

    A pair: preference + nll_weight * NLL(y_w). An SFT example, which has no rejected: sft_weight * NLL(y_w); whatever
    finite numbers stand in its rejected side have no effect, not even on gradients.
    """
    pair_B = preference(chosen, rejected, signals) + nll_weight * chosen.nll_B
    return weight_B * torch.where(is_pair_B, pair_B, sft_weight * chosen.nll_B)
