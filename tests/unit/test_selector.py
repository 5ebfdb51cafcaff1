from typing import Any

import pytest

from streaming.config import SelectionConfig
from streaming.records import Implicit, Margins, Message, ScoredGroup, decode, encode
from streaming.records import Pair as PairRecord
from streaming.selector import Selection, prompt_text, select
from tests.builders import make_candidate, make_group, make_prompt, make_scored


def selected(scored: ScoredGroup, **settings: Any) -> Selection:
    return select(scored, SelectionConfig(**settings), policy="policy")


def roles_of(selection: Selection) -> tuple[int, int | None]:
    assert selection.pair is not None
    return selection.pair.chosen.candidate, selection.pair.rejected and selection.pair.rejected.candidate


def test_the_best_is_chosen_and_the_worst_of_a_small_group_rejected() -> None:
    selection = selected(make_scored([0.5, 0.9, 0.1, 0.6]))
    assert selection.decision == ("dpo", "margin")
    assert roles_of(selection) == (1, 2)
    assert selection.is_worst_rejected


def test_a_pair_carries_everything_that_made_it() -> None:
    scored = make_scored(
        [0.0, 1.0], implicit=[Implicit(model="sampled", h=[0.5, 2.0])], reference_logprobs=[-1.0, -2.0]
    )
    pair = selected(scored).pair
    assert pair is not None and pair.rejected is not None
    assert pair.margins == Margins(external=1.0, implicit=1.5)
    assert (pair.rating_gap, pair.spread) == (1.0, 0.5)
    assert (pair.chosen.reward, pair.chosen.reference_logprob, pair.rejected.reference_logprob) == (1.0, -2.0, -1.0)
    assert pair.chosen.tokens == scored.group.candidates[1].tokens
    assert pair.content_hash == scored.group.content_hash
    assert decode(PairRecord, encode(pair)) == pair


def test_a_negative_implicit_margin_does_not_keep_a_pair_from_teaching() -> None:
    scored = make_scored([1.0, 0.0], implicit=[Implicit(model="sampled", h=[-50.0, 50.0])])
    assert selected(scored).decision == ("dpo", "margin")


def test_the_same_group_and_settings_give_the_same_pair() -> None:
    assert selected(make_scored()) == selected(make_scored())
    first, other = selected(make_scored()).pair, selected(make_scored(), min_margin=0.5).pair
    assert first is not None and other is not None
    assert first.pair_id != other.pair_id


def test_equal_texts_never_meet_in_a_pair() -> None:
    selection = selected(make_scored([1.0, 0.0, 0.5], texts=["a", "a", "b"]))
    assert roles_of(selection) == (0, 2)


def test_one_text_alone_is_an_sft_example_where_it_is_good() -> None:
    scored = make_scored([1.0, 1.0], texts=["a", "a"])
    assert selected(scored).decision == ("drop", "identical")
    selection = selected(scored, sft_floor=1.0)
    assert selection.decision == ("sft", "identical")
    assert roles_of(selection) == (0, None)
    assert selection.pair is not None and selection.pair.margins == Margins()


def test_ties_with_good_answers_become_sft_examples() -> None:
    assert selected(make_scored([1.0, 1.0]), sft_floor=0.5).decision == ("sft", "no_spread")
    assert selected(make_scored([0.0, 0.0]), sft_floor=0.5).decision == ("drop", "no_spread")


def test_a_small_margin_is_a_tie() -> None:
    assert selected(make_scored([1.0, 0.8]), min_margin=0.3).decision == ("drop", "small_margin")


def test_an_sft_example_ended_by_itself_even_where_a_truncated_answer_is_better() -> None:
    group = make_group(candidates=[make_candidate("a", has_eos=False), make_candidate("b")])
    selection = selected(make_scored([1.0, 0.9], group=group), min_margin=0.3, sft_floor=0.5)
    assert selection.decision == ("sft", "small_margin")
    assert roles_of(selection) == (1, None)


def test_a_group_of_truncated_answers_makes_no_sft_example() -> None:
    group = make_group(candidates=[make_candidate("a", has_eos=False), make_candidate("b", has_eos=False)])
    assert selected(make_scored([1.0, 1.0], group=group), sft_floor=0.5).decision == ("drop", "truncated")


def test_a_candidate_without_a_reward_takes_no_part() -> None:
    assert roles_of(selected(make_scored([1.0, None, 0.5]))) == (0, 2)
    assert selected(make_scored([1.0, None]), sft_floor=0.5).decision == ("sft", "single")


def test_a_group_without_rewards_is_dropped_with_that_reason() -> None:
    assert selected(make_scored([None, None])).decision == ("drop", "reward_missing")


def test_a_candidate_without_a_finite_reference_takes_no_part() -> None:
    scored = make_scored([1.0, 0.5, 0.0], reference_logprobs=[float("nan"), -1.0, -1.0])
    assert roles_of(selected(scored)) == (1, 2)
    scored = make_scored([1.0, 0.5], reference_logprobs=[float("nan"), float("-inf")])
    assert selected(scored).decision == ("drop", "non_finite")


def test_a_candidate_without_tokens_takes_no_part() -> None:
    group = make_group(candidates=[make_candidate("", tokens=[]), make_candidate("b", tokens=[])])
    assert selected(make_scored([1.0, 0.0], group=group)).decision == ("drop", "empty")
    assert selected(make_scored([], group=make_group([]))).decision == ("drop", "empty")


def test_it_is_told_when_the_sweet_spot_is_not_the_worst() -> None:
    selection = selected(make_scored([*[10.0] * 18, 9.0, 7.0, -3.0]))
    assert roles_of(selection) == (0, 19)
    assert selection.is_worst_rejected is False


@pytest.mark.parametrize("rule", ["max_min", "sweet_spot", "quantile"])
def test_every_rule_finds_the_only_wrong_answer(rule: str) -> None:
    assert roles_of(selected(make_scored([*[1.0] * 31, 0.0]), rule=rule)) == (0, 31)


def test_a_conversation_is_readable() -> None:
    request = make_prompt(
        text=None, messages=[Message(role="system", content="Be brief."), Message(role="user", content="Hi")]
    )
    assert prompt_text(request) == "system: Be brief.\nuser: Hi"
