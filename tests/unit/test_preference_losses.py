"""Every preference loss against its formula written out plainly, against its limits, and against TRL's."""

import inspect
import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.config import COEFFICIENTS, NEED_RATINGS, LossConfig
from learner.losses import PREFERENCES, Side, Signals, example_losses, preference_of
from streaming.config import Reload, reload_class

BETA = 0.3
ENDLESS = 1e12
EVERY = sorted(PREFERENCES)


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def sides(pairs):
    """Chosen and rejected of pairs of (policy, reference, length); the policy takes gradients."""
    made = []
    for place in (0, 1):
        policy, reference, length = (tensor([pair[place][field] for pair in pairs]) for field in range(3))
        made.append(Side(policy.requires_grad_(), reference, length))
    return made


def signals(gaps, scale=1.0):
    return Signals(tensor([math.nan if gap is None else gap for gap in gaps]), scale)


def loss_and_gradients(name, pairs, gaps, *, scale=1.0, **coefficients):
    """The loss of each pair, and its gradients in the policy's two log-probs."""
    chosen, rejected = sides(pairs)
    defaults = LossConfig(name=name, beta=BETA).coefficients
    loss_B = preference_of(name, **{**defaults, **coefficients})(chosen, rejected, signals(gaps, scale))
    gradients = torch.autograd.grad(loss_B.sum(), [chosen.policy_B, rejected.policy_B], allow_unused=True)
    return torch.stack([loss_B.detach(), *gradients])


PAIRS = [
    ((-12.0, -10.0, 24), (-20.0, -18.5, 20)),
    ((-0.5, -1.5, 1), (-2.0, -1.0, 1)),
    ((-40.0, -20.0, 30), (-10.0, -30.0, 7)),
    ((-9.0, -8.0, 4), (-9.0, -12.0, 5)),
]
GAPS = [0.5, 2.0, -0.3, 0.0]


def plain(name, pair, gap, *, scale, beta, eps=0.0, max_margin=0.0, gamma=0.0, sharpness=0.0, beta_1=0.0, variance=0.0,
          logit_scale=0.0):  # fmt: skip
    """A pair's loss and gradients in float64, from the formulas of the papers, a case at a time."""
    w, v = (torch.tensor(side[0], dtype=torch.float64, requires_grad=True) for side in pair)
    (_, w_ref, n), (_, v_ref, m) = pair
    d = (w - w_ref) - (v - v_ref)
    delta = None if gap is None else gap / scale

    def l(z):  # noqa: E743
        return torch.log(1 + torch.exp(-z))

    def formula():
        match name:
            case "dpo":
                return l(beta * d)
            case "cdpo":
                return (1 - eps) * l(beta * d) + eps * l(-beta * d)
            case "robust":
                z = beta * d if beta * d <= max_margin else max_margin + 0 * d
                return ((1 - eps) * l(z) - eps * l(-z)) / (1 - 2 * eps)
            case "ipo":
                return (d - 1 / (2 * beta)) ** 2
            case "slic":
                return 1 - beta * d if beta * d < 1 else 0 * d
            case "simpo":
                return l(beta / n * w - beta / m * v - gamma)
            case "soft" if delta is not None:
                p = 1 / (1 + math.exp(-sharpness * delta))
                return p * l(beta * d) + (1 - p) * l(-beta * d)
            case "rdpo" if delta is not None:
                return l(beta * d - beta / beta_1 * delta)
            case "ripo":
                return (beta * d - beta / beta_1 * (delta or 0) - 1 / 2) ** 2
            case "ml_rdpo" if gap is not None:
                return l(beta * d) + (gap / logit_scale - beta * d) ** 2 / (2 * variance)
        return l(beta * d)

    loss = formula()
    return torch.stack([loss.detach(), *torch.autograd.grad(loss, [w, v])])


LOGPROBS = st.floats(-60, 0)
RESPONSES = st.tuples(LOGPROBS, LOGPROBS, st.integers(1, 40))
RATED = st.tuples(RESPONSES, RESPONSES, st.none() | st.floats(-5, 5))
RANGES = {
    "beta": st.floats(0.01, 2.5), "eps": st.floats(0, 0.45), "max_margin": st.floats(0.1, 20), "gamma": st.floats(0, 2),
    "sharpness": st.floats(0.1, 5), "beta_1": st.floats(0.05, 5), "variance": st.floats(0.1, 5),
    "logit_scale": st.floats(0.1, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
@given(data=st.data())
def test_every_loss_and_its_gradient_are_the_formula(name, data):
    rated = data.draw(st.lists(RATED, min_size=1, max_size=4))
    scale = data.draw(st.floats(0.1, 10))
    coefficients = {one: data.draw(RANGES[one]) for one in ("beta", *COEFFICIENTS[name])}
    pairs, gaps = [pair for *pair, _ in rated], [gap for *_, gap in rated]
    ours = loss_and_gradients(name, pairs, gaps, scale=scale, **coefficients)
    theirs = [plain(name, pair, gap, scale=scale, **coefficients) for pair, gap in zip(pairs, gaps, strict=True)]
    torch.testing.assert_close(ours, torch.stack(theirs, dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "coefficients", "limit"),
    [
        ("cdpo", {"eps": 0.0}, "dpo"),
        ("robust", {"eps": 0.0, "max_margin": ENDLESS}, "dpo"),
        ("soft", {"sharpness": ENDLESS}, "dpo"),
        ("rdpo", {"beta_1": ENDLESS}, "dpo"),
        ("ml_rdpo", {"variance": ENDLESS}, "dpo"),
    ],
)
def test_the_limit_of_a_loss_is_dpo(name, coefficients, limit):
    gaps = [0.5, 2.0, 0.3, 0.1]  # soft labels of gaps against the chosen response have the reversed pair as limit
    ours = loss_and_gradients(name, PAIRS, gaps, **coefficients)
    torch.testing.assert_close(ours, loss_and_gradients(limit, PAIRS, gaps), rtol=1e-9, atol=1e-9)


def test_the_limit_of_ripo_is_beta_squared_times_ipo():
    ours = loss_and_gradients("ripo", PAIRS, GAPS, beta_1=ENDLESS)
    torch.testing.assert_close(ours, BETA**2 * loss_and_gradients("ipo", PAIRS, GAPS), rtol=1e-9, atol=1e-9)


def test_the_limit_of_ml_rdpo_without_variance_is_distilled_dpo():
    """The squared distance of implicit and external reward margin (arXiv 2405.19316), whatever the labels say."""
    variance = 1e-12
    ours = variance * loss_and_gradients("ml_rdpo", PAIRS, GAPS, variance=variance, logit_scale=2.0)[0]
    d = tensor([(w[0] - w[1]) - (v[0] - v[1]) for w, v in PAIRS])
    torch.testing.assert_close(ours, (tensor(GAPS) / 2 - BETA * d) ** 2 / 2, rtol=1e-9, atol=1e-9)


def test_soft_labels_of_gaps_of_zero_say_nothing_about_who_is_better():
    ours = loss_and_gradients("soft", PAIRS, [0.0] * 4)
    swapped = loss_and_gradients("soft", [(v, w) for w, v in PAIRS], [0.0] * 4)
    torch.testing.assert_close(ours[0], swapped[0])


def test_simpo_without_a_margin_is_dpo_of_single_tokens_against_a_reference_that_is_certain():
    pairs = [((w[0], 0.0, 1), (v[0], 0.0, 1)) for w, v in PAIRS]
    torch.testing.assert_close(
        loss_and_gradients("simpo", pairs, GAPS, gamma=0.0), loss_and_gradients("dpo", pairs, GAPS)
    )


def test_robust_is_right_on_average_over_flipped_labels():
    eps = 0.2
    kept, flipped = PAIRS, [(v, w) for w, v in PAIRS]
    ours = [loss_and_gradients("robust", pairs, GAPS, eps=eps, max_margin=ENDLESS)[0] for pairs in (kept, flipped)]
    torch.testing.assert_close((1 - eps) * ours[0] + eps * ours[1], loss_and_gradients("dpo", PAIRS, GAPS)[0])


def test_robust_falls_no_further_than_its_largest_margin():
    far = [((0.0, -1e6, 1), (0.0, 0.0, 1)), ((0.0, -10.0 / BETA, 1), (0.0, 0.0, 1))]
    (loss, at_bound), (gradient, _), _ = loss_and_gradients("robust", far, [None] * 2)
    assert loss == at_bound == pytest.approx(-0.1 * 10 / 0.8, abs=1e-4)
    assert gradient == 0


def test_cdpo_rests_at_the_margin_whose_probability_is_that_of_a_right_label():
    d = math.log(0.9 / 0.1) / BETA
    _, gradient, _ = loss_and_gradients("cdpo", [((d, 0.0, 1), (0.0, 0.0, 1))], [None], eps=0.1)
    assert gradient.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["soft", "rdpo", "ml_rdpo"])
def test_a_pair_without_a_rating_is_plain_dpo_whatever_the_others_have(name):
    ours = loss_and_gradients(name, PAIRS, [None, *GAPS[1:]], scale=3.0)
    torch.testing.assert_close(ours[:, 0], loss_and_gradients("dpo", PAIRS, GAPS)[:, 0])
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", ["soft", "ml_rdpo"])
def test_a_missing_rating_is_not_a_gap_of_zero(name):
    missing, zero = (loss_and_gradients(name, PAIRS[:1], [gap]) for gap in (None, 0.0))
    assert not torch.isclose(missing, zero).any()


@pytest.mark.parametrize("name", ["soft", "rdpo", "ripo"])
def test_gaps_are_seen_in_typical_gaps(name):
    ours = loss_and_gradients(name, PAIRS, [20 * gap for gap in GAPS], scale=20.0)
    torch.testing.assert_close(ours, loss_and_gradients(name, PAIRS, GAPS))


def test_ml_rdpo_sees_gaps_in_logits_whatever_a_typical_gap_is():
    ours = loss_and_gradients("ml_rdpo", PAIRS, GAPS, scale=20.0)
    torch.testing.assert_close(ours, loss_and_gradients("ml_rdpo", PAIRS, GAPS))


@pytest.mark.parametrize("name", EVERY)
def test_an_sft_example_knows_nothing_of_the_preference_loss(name):
    chosen, rejected = sides([PAIRS[0], ((-8.0, -7.0, 4), (0.0, 0.0, 0))])
    loss_B = example_losses(
        chosen, rejected, signals([0.5, None]), is_pair_B=torch.tensor([True, False]), weight_B=tensor([1.0, 2.0]),
        preference=preference_of(name, **LossConfig(name=name).coefficients), nll_weight=0.2, sft_weight=0.7,
    )  # fmt: skip
    for_chosen, for_rejected = torch.autograd.grad(loss_B.sum(), [chosen.policy_B, rejected.policy_B])
    assert loss_B[1].item() == pytest.approx(2 * 0.7 * 8 / 4)
    assert (for_chosen[1].item(), for_rejected[1].item()) == (pytest.approx(-2 * 0.7 / 4), 0)


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_takes_the_coefficients_that_the_settings_name_and_each_has_an_effect(name):
    keywords = [
        one.name for one in inspect.signature(PREFERENCES[name]).parameters.values() if one.kind == one.KEYWORD_ONLY
    ]
    assert keywords == ["beta", *COEFFICIENTS[name]]
    far = [((0.0, -50.0, 1), (0.0, 0.0, 1))]  # so that the margin is beyond `max_margin`
    before = loss_and_gradients(name, [*PAIRS, *far], [*GAPS, 1.0])
    for one, value in LossConfig(name=name, beta=BETA).coefficients.items():
        assert not torch.equal(before, loss_and_gradients(name, [*PAIRS, *far], [*GAPS, 1.0], **{one: 0.7 * value}))


@pytest.mark.parametrize("name", EVERY)
def test_the_losses_that_need_ratings_are_those_that_a_gap_changes(name):
    changed = loss_and_gradients(name, PAIRS, [1.0] * 4) != loss_and_gradients(name, PAIRS, [2.0] * 4)
    assert changed.any() == (name in NEED_RATINGS)


def test_the_settings_name_every_loss_and_a_loss_may_change_at_a_step():
    assert sorted(get_args(LossConfig.model_fields["name"].annotation)) == sorted(COEFFICIENTS) == EVERY
    assert {reload_class(field) for field in LossConfig.model_fields.values()} == {Reload.STEP}


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"eps": 0.1}, "eps"),
        ({"name": "rdpo", "sharpness": 1}, "sharpness"),
        ({"name": "cdpo", "gamma": 1}, "gamma"),
    ],
)
def test_a_coefficient_that_the_loss_does_not_take_is_refused(settings, idle):
    with pytest.raises(ValueError, match=rf"{idle}.* has no effect on the loss"):
        LossConfig(**settings)


def test_a_coefficient_that_was_set_is_the_one_that_the_loss_takes():
    assert LossConfig(name="robust", beta=0.2, eps=0.0).coefficients == {"beta": 0.2, "eps": 0.0, "max_margin": 10.0}


def trl_loss_and_gradients(loss_type, pair, *, eps):
    """TRL's own loss of one pair, whose log-probs it gets token by token, and its gradients in their sums."""
    from trl import DPOTrainer

    lengths = [side[2] for side in pair]
    places = torch.arange(1 + max(lengths))
    mask = torch.stack([(places >= 1) & (places <= length) for length in lengths]).long()
    sums = tensor([side[0] for side in pair]).requires_grad_()
    logprobs = (sums / tensor(lengths))[:, None] * mask[:, 1:]
    nothing = torch.zeros_like(logprobs).detach()
    outputs = SimpleNamespace(log_probs=logprobs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    same = SimpleNamespace(gather=lambda one: one, gather_for_metrics=lambda one: one, device="cpu")
    metrics = {"train": {name: [] for name in TRL_METRICS}}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None, beta=BETA,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        label_smoothing=eps, use_weighting=False, _metrics=metrics, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": mask, "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": tensor([pair[0][1]]), "ref_rejected_logps": tensor([pair[1][1]]),
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return torch.cat([loss.detach()[None], *torch.autograd.grad(loss, [sums])])


TRL_METRICS = (
    "entropy", "num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/chosen",
    "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip


@pytest.mark.slow  # TRL takes its time to import
@pytest.mark.parametrize(
    ("name", "loss_type"),
    [
        ("dpo", "sigmoid"),
        ("slic", "hinge"),
        ("robust", "robust"),
        ("ipo", "ipo"),
        ("cdpo", "aot_unpaired"),  # cDPO of sorted margins, and a single one is sorted
    ],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_loss_that_trl_has_too_is_trls(name, loss_type, pair):
    if name == "ipo":
        pair = [(*side[:2], 1) for side in pair]  # TRL divides by lengths, the paper does not
    coefficients = {"eps": 0.2} if "eps" in COEFFICIENTS[name] else {}
    ours = loss_and_gradients(name, [pair], [None], **coefficients)[:, 0]
    torch.testing.assert_close(ours, trl_loss_and_gradients(loss_type, pair, eps=0.2))
