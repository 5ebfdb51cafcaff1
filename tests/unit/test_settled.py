from learner.settled import Settled
from tests.builders import make_pair


def test_a_settled_pair_is_a_duplicate_wherever_it_appears_again():
    settled = Settled()
    assert settled.judge(make_pair(3)) == "new"
    settled.settle(make_pair(3))
    assert settled.judge(make_pair(3)) == "duplicate"


def test_a_request_is_settled_when_all_its_examples_are():
    settled = Settled()
    settled.settle(make_pair(3, index=0, num_examples=2))
    assert settled.judge(make_pair(3, index=0, num_examples=2)) == "duplicate"
    assert settled.judge(make_pair(3, index=1, num_examples=2)) == "new"
    settled.settle(make_pair(3, index=1, num_examples=2))
    assert settled.state().claims == []
    assert settled.judge(make_pair(3, index=1, num_examples=2)) == "duplicate"


def test_the_first_content_of_a_request_wins_and_another_is_superseded():
    settled = Settled()
    settled.settle(make_pair(3, index=0, num_examples=2))
    assert settled.judge(make_pair(3, index=1, num_examples=2, content_hash="sampled again")) == "superseded"


def test_the_first_selection_settings_of_a_request_win():
    settled = Settled()
    settled.settle(make_pair(3, index=0, num_examples=2))
    assert settled.judge(make_pair(3, index=1, num_examples=2, settings_hash="changed")) == "superseded"


def test_what_is_settled_survives_a_checkpoint():
    settled = Settled()
    for number in (0, 1, 2, 7):
        settled.settle(make_pair(number))
    settled.settle(make_pair(9, index=1, num_examples=2))
    restored = Settled(settled.state())
    assert restored.state() == settled.state()
    assert restored.state().intervals == [(0, 3), (7, 8)]
    assert [restored.judge(make_pair(n)) for n in (0, 2, 3, 7)] == ["duplicate", "duplicate", "new", "duplicate"]
    assert restored.judge(make_pair(9, index=1, num_examples=2)) == "duplicate"
