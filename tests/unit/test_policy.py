import pytest
import torch
from msgspec.structs import replace

from deploy.tiny_model import save_tiny_model
from learner.batch import example_of, to_tensors
from learner.policy import load_model, max_length, price, vocabulary_size
from streaming.errors import NotReadyError
from streaming.reference import ReferenceModel
from tests.builders import make_pair


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def load(directory, **settings):
    defaults = {"dtype": "float32", "gradient_checkpointing": False, "trust_remote_code": False}
    return load_model(str(directory), **{**defaults, **settings})


def priced_pair(reference, number):
    """A pair with the scorer's reference log-probs; every fourth has no rejected."""
    pair = make_pair(number, rejected=None if number % 4 == 0 else "9" * (number % 7))

    def priced(side):
        [total] = reference.logprobs([(pair.prompt_tokens, side.tokens)])
        return replace(side, reference_logprob=total)

    return replace(pair, chosen=priced(pair.chosen), rejected=pair.rejected and priced(pair.rejected))


def test_before_the_first_step_the_policy_is_the_scorers_reference(directory):
    reference = ReferenceModel(directory, batch_tokens=256)
    examples = [example_of(priced_pair(reference, number)) for number in range(12)]
    chosen, rejected = price(load(directory), to_tensors(examples))
    torch.testing.assert_close(chosen.h_B, torch.zeros(12), rtol=0, atol=1e-4)
    is_pair_B = torch.tensor([number % 4 != 0 for number in range(12)])
    torch.testing.assert_close(rejected.h_B[is_pair_B], torch.zeros(9), rtol=0, atol=1e-4)


def test_a_model_says_what_it_takes(directory):
    model = load(directory)
    assert max_length(model) == 512
    assert vocabulary_size(model) == model.lm_head.out_features


def test_a_directory_without_a_model_is_named(tmp_path):
    with pytest.raises(NotReadyError, match=str(tmp_path)):
        load(tmp_path)


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        ("llama", {"attention_dropout": 0.5}),  # kept by the attention
        ("gpt2", {"resid_pdrop": 0.5}),  # a module
        ("opt", {"dropout": 0.5}),  # kept by layers, under another name
        ("opt", {"dropout": 0.0, "layerdrop": 0.5}),  # of whole layers
        ("persimmon", {"hidden_dropout": 0.0, "attention_dropout": 0.5}),  # looked up with every call
    ],
)
def test_training_is_without_dropout(tmp_path, kind, dropout):
    """OPT and others used to train and to be compared with what they had sampled, with dropout on."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **dropout)).train()
    model.save_pretrained(tmp_path)
    assert not torch.equal(*forwards(model))  # the model does drop, when it is told to
    assert torch.equal(*forwards(load(tmp_path)))


def forwards(model):
    """What two forward passes of the same tokens give."""
    return [model(input_ids=torch.arange(30)[None], use_cache=False).logits for _ in range(2)]
