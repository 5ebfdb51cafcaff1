import pytest
import torch

from deploy.tiny_model import build_model, build_tokenizer
from streaming.errors import DataError
from streaming.logprobs import response_logprobs, sequence_logprobs

EXAMPLES = [([5, 6, 7], [8, 9, 1]), ([5], [6, 7, 8, 9, 10, 11]), ([5, 6, 7, 8, 9, 10, 11, 12], [1]), ([9, 9], [4, 4])]


@pytest.fixture(scope="module")
def model():
    return build_model(build_tokenizer()).eval()


def plain(model, prompt, response):
    """log softmax over the whole sequence, alone and without padding, in float64."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits.double()[0]
    at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
    return torch.stack([logits[i].log_softmax(-1)[token] for i, token in zip(at, response, strict=True)])


def test_logprobs_of_a_padded_batch_are_those_of_each_sequence_alone(model):
    together = sequence_logprobs(model, EXAMPLES)
    for example, logprobs in zip(EXAMPLES, together, strict=True):
        assert logprobs == pytest.approx(plain(model, *example).tolist(), abs=1e-5)


def test_gradients_of_a_padded_batch_are_those_of_each_sequence_alone(model):
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5])
    ours = gradients(model, (response_logprobs(model, EXAMPLES).sums_B * weights).sum())
    alone = sum(weight * plain(model, *example).sum() for weight, example in zip(weights, EXAMPLES, strict=True))
    for one, other in zip(ours, gradients(model, alone), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_an_empty_response_sums_to_zero_beside_a_real_one(model):
    gathered = response_logprobs(model, [([5, 6], []), ([5, 6], [7])])
    assert gathered.sums_B[0] == 0
    assert gathered.lengths_B.tolist() == [0, 1]


def test_a_batch_of_empty_responses_needs_no_forward_pass(model):
    assert sequence_logprobs(model, [([5], []), ([5], [])]) == [[], []]


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(DataError, match="no tokens"):
        sequence_logprobs(model, [([], [1])])


def test_the_model_is_asked_only_for_the_logits_that_are_needed(model):
    asked = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: asked.append(inputs[0].shape[1]))
    sequence_logprobs(model, [([5] * 20, [6, 7]), ([5] * 18, [6, 7, 8])])
    handle.remove()
    assert asked == [4]  # columns 17 to 20 of the longest input, of 21
