import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deploy.tiny_model import build_model, build_tokenizer
from learner.batch import Example, example_of, plan, to_tensors
from learner.policy import price
from tests.builders import make_pair


def make_example(prompt=4, chosen=4, rejected=4):
    """An example of so many tokens; the tokens differ from side to side."""
    return Example(
        prompt_tokens=[5] * prompt,
        chosen_tokens=[6] * chosen,
        rejected_tokens=None if rejected is None else [7] * rejected,
        reference_chosen=-1.0 * chosen,
        reference_rejected=-2.0 * (rejected or 0),
    )


lengths = st.integers(1, 40)
examples = st.lists(
    st.builds(make_example, prompt=lengths, chosen=lengths, rejected=st.none() | lengths), min_size=1, max_size=40
)


@given(examples, st.integers(1, 4), st.integers(64, 400))
def test_every_example_is_trained_exactly_once(examples, world_size, max_tokens):
    planned = plan(examples, world_size=world_size, max_tokens=max_tokens)
    assert sorted(i for rank in planned for batch in rank for i in batch) == list(range(len(examples)))


@given(examples, st.integers(1, 4), st.integers(64, 400))
def test_every_rank_has_the_same_number_of_micro_batches(examples, world_size, max_tokens):
    planned = plan(examples, world_size=world_size, max_tokens=max_tokens)
    assert len(planned) == world_size
    assert len({len(rank) for rank in planned}) == 1


@given(examples, st.integers(1, 4), st.integers(64, 400))
def test_a_micro_batch_keeps_to_the_budget_unless_one_example_alone_is_larger(examples, world_size, max_tokens):
    for batch in (batch for rank in plan(examples, world_size=world_size, max_tokens=max_tokens) for batch in rank):
        num_sequences = sum(examples[i].num_sequences for i in batch)
        padded = num_sequences * max((examples[i].max_tokens for i in batch), default=0)
        assert len(batch) <= 1 or padded <= max_tokens


def test_the_ranks_share_a_batch_that_fits_into_one_micro_batch():
    assert plan([make_example()] * 4, world_size=2, max_tokens=10_000) == [[[0, 2]], [[1, 3]]]


def test_a_rank_without_work_runs_an_empty_micro_batch():
    assert plan([make_example()], world_size=2, max_tokens=10_000) == [[[0]], [[]]]


def test_examples_of_like_length_share_a_micro_batch():
    long, short = make_example(prompt=30), make_example(prompt=2)
    assert plan([long, short, long, short], world_size=1, max_tokens=160) == [[[0, 2], [1, 3]]]


def test_an_sft_pair_has_one_sequence():
    assert example_of(make_pair(rejected=None)).num_sequences == 1
    assert example_of(make_pair()).num_sequences == 2


def test_a_pair_keeps_its_reference_log_probs():
    pair = make_pair(chosen="12", rejected="3")
    example = example_of(pair)
    assert (example.reference_chosen, example.reference_rejected) == (-3.0, -2.0)


@pytest.fixture(scope="module")
def model():
    return build_model(build_tokenizer())


def test_sides_of_a_mixed_micro_batch_are_those_of_each_example_alone(model):
    examples = [make_example(3, 5, 2), make_example(6, 1, None), make_example(1, 2, 9)]
    together = price(model, to_tensors(examples))
    for i, example in enumerate(examples):
        for side, alone in zip(together, price(model, to_tensors([example])), strict=True):
            for values, value in zip(side, alone, strict=True):
                torch.testing.assert_close(values[i : i + 1], value, atol=1e-4, rtol=1e-5)


def test_an_sft_example_has_an_empty_rejected_side(model):
    _, rejected = price(model, to_tensors([make_example(3, 5, 2), make_example(6, 1, None)]))
    assert [values[1].item() for values in rejected] == [0, 0, 0]


def test_an_empty_micro_batch_weighs_nothing(model):
    batch = to_tensors([])
    assert (batch.num_examples, batch.num_tokens, batch.weight_B.tolist()) == (0, 0, [0.0])
    price(model, batch)
