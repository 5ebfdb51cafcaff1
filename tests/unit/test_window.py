import pytest

from streaming.selection.window import Outcome, Window, pearson


def window(*outcomes: Outcome, size: int = 16) -> Window:
    made = Window(size)
    for outcome in outcomes:
        made.add(outcome)
    return made


def test_shares_are_those_of_the_newest_groups() -> None:
    seen = window(Outcome("drop"), Outcome("dpo"), Outcome("dpo"), Outcome("sft"), Outcome("drop"), size=4)
    assert seen.shares() == {"dpo": 0.5, "sft": 0.25, "drop": 0.25}


def test_an_empty_window_knows_nothing() -> None:
    assert window().shares() == {"dpo": 0.0, "sft": 0.0, "drop": 0.0}
    assert window().mean_margin() is None
    assert window().correlation() is None


def test_the_mean_margin_is_that_of_the_pairs() -> None:
    assert window(Outcome("dpo", 1.0), Outcome("drop"), Outcome("dpo", 0.5)).mean_margin() == 0.75


def test_margins_that_rise_together_correlate() -> None:
    pairs = [Outcome("dpo", 1.0, 0.1), Outcome("dpo", 2.0, 0.2), Outcome("dpo", 3.0, 0.3), Outcome("dpo", 9.0)]
    assert window(*pairs).correlation() == pytest.approx(1.0)


def test_a_margin_without_spread_correlates_with_nothing() -> None:
    assert window(Outcome("dpo", 1.0, 0.0), Outcome("dpo", 2.0, 0.0)).correlation() is None


def test_a_correlation_is_that_of_the_formula() -> None:
    assert pearson([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)
