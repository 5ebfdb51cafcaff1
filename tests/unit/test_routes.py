import pytest

from streaming.selection.routes import Decision, Reason, compare, route


@pytest.mark.parametrize(
    ("num_usable", "num_distinct", "spread", "margin", "reason"),
    [
        (1, 1, 0.0, None, "single"),
        (4, 1, 0.5, None, "identical"),
        (4, 3, 0.0, 0.0, "no_spread"),
        (4, 3, 0.5, 0.0, "tie"),
        (4, 3, 0.5, 0.25, "small_margin"),
        (4, 3, 0.5, 0.26, "margin"),
    ],
)
def test_a_comparison_has_one_outcome(
    num_usable: int, num_distinct: int, spread: float, margin: float | None, reason: Reason
) -> None:
    assert compare(num_usable, num_distinct, spread=spread, margin=margin, min_margin=0.25) == reason


def decide(
    outcome: Reason,
    *,
    best: float = 1.0,
    ended: float | None = 1.0,
    chosen: float | None = None,
    sft: float | None = None,
) -> Decision:
    return route(outcome, best=best, best_ended=ended, chosen_floor=chosen, sft_floor=sft)


def test_a_clear_margin_is_a_pair() -> None:
    assert decide("margin", sft=0.5) == ("dpo", "margin")


@pytest.mark.parametrize("outcome", ["tie", "no_spread", "small_margin", "identical", "single"])
def test_a_tie_whose_answers_are_good_is_an_sft_example(outcome: Reason) -> None:
    assert decide(outcome, sft=1.0) == ("sft", outcome)


@pytest.mark.parametrize("outcome", ["tie", "no_spread", "small_margin", "identical", "single"])
def test_a_tie_whose_answers_are_bad_is_dropped(outcome: Reason) -> None:
    assert decide(outcome, best=0.9, ended=0.9, sft=1.0) == ("drop", outcome)


def test_without_an_sft_floor_ties_are_dropped() -> None:
    assert decide("tie") == ("drop", "tie")


@pytest.mark.parametrize("outcome", ["margin", "tie"])
def test_nothing_is_trained_on_below_the_chosen_floor(outcome: Reason) -> None:
    assert decide(outcome, best=0.4, chosen=0.5, sft=0.1) == ("drop", "chosen_below_floor")


def test_a_truncated_answer_is_never_an_sft_example() -> None:
    assert decide("tie", ended=None, sft=0.5) == ("drop", "truncated")
    assert decide("small_margin", best=1.0, ended=0.4, sft=0.5) == ("drop", "truncated")


def test_an_sft_example_passes_the_chosen_floor_itself() -> None:
    assert decide("small_margin", best=1.0, ended=0.7, chosen=0.8, sft=0.5) == ("drop", "truncated")
