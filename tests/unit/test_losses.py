import math

import pytest
import torch

from learner.losses import Side, Signals, dpo, example_losses, preference_of

BETA = 0.3


def side(policy, reference, length):
    return Side(
        torch.tensor(policy, requires_grad=True), torch.tensor(reference), torch.tensor(length, dtype=torch.float32)
    )


def batch():
    """A long pair, a pair of one token each, a pair that is far apart, and an SFT example (rejected stays empty)."""
    chosen = side([-12.0, -0.5, -90.0, -8.0], [-10.0, -1.5, -20.0, -7.0], [24, 1, 30, 4])
    rejected = side([-20.0, -2.0, -10.0, 0.0], [-18.0, -1.0, -60.0, 0.0], [20, 1, 7, 0])
    return chosen, rejected


def mixed(chosen, rejected, **settings):
    defaults = {"preference": preference_of("dpo", beta=BETA), "nll_weight": 0.2, "sft_weight": 0.7}
    return example_losses(
        chosen,
        rejected,
        Signals(torch.full((4,), math.nan)),
        is_pair_B=torch.tensor([True, True, True, False]),
        weight_B=torch.tensor([1.0, 2.0, 1.0, 0.5]),
        **{**defaults, **settings},
    )


def plain(chosen, rejected):
    """The same four losses, each written out in float64 from the formula."""
    losses = []
    for i, (is_pair, weight) in enumerate([(True, 1.0), (True, 2.0), (True, 1.0), (False, 0.5)]):
        (w, w_ref, n), (v, v_ref, _) = ([t[i].double() for t in s] for s in (chosen, rejected))
        d = (w - w_ref) - (v - v_ref)
        nll = -w / n
        losses.append(weight * (torch.log1p(torch.exp(-BETA * d)) + 0.2 * nll if is_pair else 0.7 * nll))
    return torch.stack(losses)


def test_losses_of_a_mixed_batch_are_the_formulas():
    torch.testing.assert_close(mixed(*batch()).double(), plain(*batch()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("which", ["chosen", "rejected"])
def test_gradients_of_a_mixed_batch_are_those_of_the_formulas(which):
    gradients = []
    for losses in (mixed, plain):
        sides = dict(zip(("chosen", "rejected"), batch(), strict=True))
        losses(**sides).sum().backward()
        gradients.append(sides[which].policy_B.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_an_sft_example_gives_its_rejected_side_no_gradient():
    chosen, rejected = batch()
    mixed(chosen, rejected).sum().backward()
    assert rejected.policy_B.grad[3] == 0


def test_dpo_of_an_unmoved_policy_is_log_two():
    chosen = side([-3.0], [-3.0], [2])
    loss = dpo(chosen, side([-9.0], [-9.0], [5]), Signals(torch.zeros(1)), beta=BETA)
    assert loss.item() == pytest.approx(math.log(2))


def test_dpo_stays_finite_where_the_margin_is_enormous():
    loss = dpo(side([0.0], [-1e5], [1]), side([-1e5], [0.0], [1]), Signals(torch.zeros(1)), beta=1.0)
    assert loss.item() == 0
    loss = dpo(side([-1e5], [0.0], [1]), side([0.0], [-1e5], [1]), Signals(torch.zeros(1)), beta=1.0)
    assert loss.item() == pytest.approx(2e5)


def test_beta_scales_the_margin():
    chosen, rejected = batch()
    halved = [Side(s.policy_B / 2, s.reference_B / 2, s.length_B) for s in (chosen, rejected)]
    signals = Signals(torch.zeros(4))
    torch.testing.assert_close(dpo(*halved, signals, beta=2 * BETA), dpo(chosen, rejected, signals, beta=BETA))
