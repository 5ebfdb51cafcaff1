import math

import pytest

from streaming.asking import Answers
from streaming.records import Implicit, Source, Version
from streaming.scoring import MISSING_EOS, Pricing, evaluated, penalty, scored
from streaming.selection.margins import combined
from tests.builders import make_candidate, make_group, make_prompt, make_rewards
from tests.unit.test_asking import CountingReference

SOURCE = Source(topic="candidates", partition=1, offset=7)
PRICING = [Pricing(CountingReference())]


def test_a_scored_group_carries_rewards_prices_and_where_it_came_from() -> None:
    group = make_group(["a", "bb"])
    record = scored(group, Answers([make_rewards([1.0, 0.0])], [-2.0, -1.0]), pricing=PRICING, source=SOURCE)
    assert (record.group, record.source, record.reference_version) == (group, SOURCE, "counting")
    assert record.reference_logprobs == [-2.0, -1.0]


def test_the_implicit_reward_is_sampled_minus_reference_over_all_tokens() -> None:
    group = make_group(candidates=[make_candidate("ab", logprob=-0.5), make_candidate("c", logprobs=[])])
    record = scored(group, Answers([], [-2.0, -1.0]), pricing=PRICING, source=SOURCE)
    assert record.implicit == [Implicit(model="sampled", h=[0.5, None])]


def test_without_a_finite_reference_there_is_no_implicit_reward() -> None:
    record = scored(make_group(["a"]), Answers([], [-math.inf]), pricing=PRICING, source=SOURCE)
    assert record.implicit[0].h == [None]


def test_an_evaluation_ends_with_its_mean_reward_and_its_version() -> None:
    request = make_prompt(purpose="eval", round=3, round_size=8)
    group = make_group(["a", "b"], request=request, version=Version(2, 5))
    feedback = evaluated(group, [make_rewards([1.0, 0.5])], time_s=9.0)
    assert (feedback.ending, feedback.mean_reward, feedback.version) == ("evaluated", 0.75, Version(2, 5))
    assert (feedback.round, feedback.round_size, feedback.request_number) == (3, 8, request.number)


def test_an_evaluation_over_two_versions_has_none() -> None:
    candidates = [make_candidate("a", version=Version(1, 0)), make_candidate("b", version=Version(1, 1))]
    assert evaluated(make_group(candidates=candidates), [make_rewards([1.0, 1.0])], time_s=0.0).version is None
    spanning = make_candidate("ab", spans=[*candidates[0].spans, *candidates[1].spans])
    assert evaluated(make_group(candidates=[spanning]), [make_rewards([1.0])], time_s=0.0).version is None


def test_an_evaluation_without_a_reward_is_dropped_and_not_zero() -> None:
    feedback = evaluated(make_group(["a"]), [make_rewards([None])], time_s=0.0)
    assert (feedback.ending, feedback.reason, feedback.mean_reward) == ("dropped", "reward_missing", None)


def test_the_penalty_lowers_cut_off_answers_and_leaves_what_sources_said() -> None:
    group = make_group(candidates=[make_candidate("a"), make_candidate("b", has_eos=False)])
    rewards = [make_rewards([1.0, 1.0], weight=2.0)]
    added = penalty(group, rewards, 0.25)
    assert [source.source for source in added] == [MISSING_EOS]
    assert combined([*rewards, *added], 2) == [2.0, 1.75]


@pytest.mark.parametrize("amount", [None, 0.0])
def test_without_a_penalty_nothing_is_added(amount: float | None) -> None:
    assert penalty(make_group(candidates=[make_candidate("b", has_eos=False)]), [make_rewards([1.0])], amount) == []


def test_the_penalty_alone_is_no_reason_to_prefer_an_answer() -> None:
    group = make_group(candidates=[make_candidate("a"), make_candidate("b", has_eos=False)])
    assert penalty(group, [make_rewards([None, None])], 0.25) == []


def test_policies_that_share_a_reference_find_the_same_log_probs_and_others_their_own() -> None:
    pricing = [Pricing(CountingReference(), ("policy", "twin")), Pricing(CountingReference(), ("b",))]
    record = scored(make_group(), Answers([], [-2.0, -1.0], [[-4.0, -3.0]]), pricing=pricing, source=SOURCE)
    shared, own = record.priced_for("twin"), record.priced_for("b")
    assert shared is not None and own is not None
    assert record.priced_for("policy") == shared
    assert (shared.logprobs, own.logprobs) == ([-2.0, -1.0], [-4.0, -3.0])
    assert record.priced_for("stranger") is None


def test_a_policy_whose_reference_cannot_price_a_group_has_no_log_probs_for_it() -> None:
    pricing = [Pricing(CountingReference()), Pricing(CountingReference(), ("b",))]
    record = scored(make_group(), Answers([], [-2.0, -1.0], [None]), pricing=pricing, source=SOURCE)
    assert record.priced_for("policy") is not None
    assert record.priced_for("b") is None
