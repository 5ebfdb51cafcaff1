import random

from streaming.token_batches import padded_batches


def test_no_batch_is_larger_than_the_budget_and_nothing_is_left_out() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 90) for _ in range(300)]
    batches = padded_batches(lengths, 256)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    assert all(max(lengths[index] for index in batch) * len(batch) <= 256 for batch in batches)


def test_sequences_of_like_length_share_a_batch() -> None:
    assert padded_batches([5, 100, 6, 99], 200) == [[1, 3], [2, 0]]


def test_a_sequence_longer_than_the_budget_is_a_batch_of_its_own() -> None:
    assert padded_batches([300, 2, 3], 100) == [[0], [2, 1]]


def test_what_stands_for_several_sequences_takes_their_room() -> None:
    assert padded_batches([10, 9, 8], 30, counts=[2, 2, 1]) == [[0], [1, 2]]
    assert padded_batches([10, 9, 8], 30, counts=[2, 1, 1]) == [[0, 1], [2]]


def test_nothing_makes_no_batch() -> None:
    assert padded_batches([], 100) == []
