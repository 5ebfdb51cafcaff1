import msgspec
import pytest

from streaming.records import Implicit, Margins
from streaming.selection import margins
from tests.builders import make_candidate, make_rewards


def test_sources_add_up_with_their_weights() -> None:
    rewards = [make_rewards([1.0, 0.0], weight=2.0), make_rewards([0.5, 3.0], weight=-1.0)]
    assert margins.combined(rewards, 2) == [1.5, -3.0]


def test_nobody_wins_by_missing_a_source() -> None:
    rewards = [make_rewards([1.0, 1.0, 0.0]), make_rewards([-5.0, None, -1.0])]
    assert margins.combined(rewards, 3) == [-4.0, None, -1.0]


def test_a_source_that_is_missing_for_all_is_left_out_of_the_comparison() -> None:
    assert margins.combined([make_rewards([1.0, 0.0]), make_rewards([None, None])], 2) == [1.0, 0.0]


def test_a_missing_value_of_a_source_without_weight_excludes_nobody() -> None:
    assert margins.combined([make_rewards([1.0, 0.0]), make_rewards([None, 7.0], weight=0.0)], 2) == [1.0, 0.0]


def test_without_any_value_nobody_has_a_reward() -> None:
    assert margins.combined([make_rewards([None, None])], 2) == [None, None]


def test_a_measurement_without_a_whole_source_is_none() -> None:
    assert margins.measured([make_rewards([1.0, 0.0]), make_rewards([None, None])], 2) is None


def test_a_measurement_is_the_mean_over_the_candidates_that_have_a_reward() -> None:
    assert margins.measured([make_rewards([1.0, None, 0.5])], 3) == 0.75


def test_margins_are_chosen_minus_rejected() -> None:
    found = margins.between(1, 0, [0.25, 1.0], [Implicit(model="sampled", h=[2.0, -1.0])])
    assert found == Margins(external=0.75, implicit=-3.0)


@pytest.mark.parametrize(
    "implicit", [[], [Implicit(model="other", h=[1.0, 2.0])], [Implicit(model="sampled", h=[None, 1.0])]]
)
def test_an_implicit_margin_that_cannot_be_computed_is_none(implicit: list[Implicit]) -> None:
    assert margins.between(0, 1, [1.0, 0.0], implicit).implicit is None


def test_the_spread_is_that_of_the_group_itself() -> None:
    assert margins.spread([0.0, 0.0, 1.0, 1.0]) == 0.5
    assert margins.spread([0.1, 0.1, 0.1]) == 0.0


@pytest.mark.parametrize("logprobs", [[], [-0.5], [-0.5, float("-inf"), -0.5]])
def test_a_response_without_all_its_logprobs_has_no_sum(logprobs: list[float]) -> None:
    assert make_candidate("ab", logprobs=logprobs).logprob is None


def test_the_sum_of_logprobs_includes_the_end_of_sequence() -> None:
    assert make_candidate("ab", logprob=-0.5).logprob == -1.5


def test_a_source_that_declines_to_judge_a_prompt_is_left_out_of_its_measurement() -> None:
    """Rewards of several tasks, each None for the others' prompts, once left every held-out round unmeasured."""
    failed = make_rewards([None], source="code")
    declined = msgspec.structs.replace(failed, reasons=["not_applicable"])
    assert margins.measured([make_rewards([1.0]), declined], 1) == 1.0
    assert margins.measured([make_rewards([1.0]), failed], 1) is None
