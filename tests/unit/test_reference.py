import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy.tiny_model import save_tiny_model
from streaming.errors import NotReadyError, RecordError
from streaming.reference import ReferenceModel, weights_version
from tests.builders import make_candidate, make_group


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(directory: Path) -> ReferenceModel:
    return ReferenceModel(directory, batch_tokens=64)


def plain(directory: Path, prompt: list[int], response: list[int]) -> float:
    """log pi(y|x) of one sequence, alone, without padding, in float64."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
    return float(sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(response)))


def test_prices_across_groups_and_batches_are_those_of_each_response_alone(
    directory: Path, reference: ReferenceModel
) -> None:
    groups = [
        make_group(["12", "a rather long answer that fills a batch", "12"]),
        make_group(["3"], number=17),
        make_group(candidates=[make_candidate("cut off", has_eos=False), make_candidate("", tokens=[])]),
    ]
    prices = reference.price(groups)
    assert [len(price) for price in prices] == [3, 1, 2]
    for group, price in zip(groups, prices, strict=True):
        for candidate, found in zip(group.candidates, price, strict=True):
            assert found == pytest.approx(plain(directory, group.prompt_tokens, candidate.tokens), abs=1e-4)


def test_the_tokens_are_priced_and_not_the_text(reference: ReferenceModel) -> None:
    first = make_group(candidates=[make_candidate("12", tokens=[9, 10])])
    second = make_group(candidates=[make_candidate("12", tokens=[9, 11])])
    assert reference.price([first]) != reference.price([second])


def test_a_sequence_is_forwarded_once_however_often_it_was_sampled(
    reference: ReferenceModel,
) -> None:
    rows: list[int] = []
    handle = reference._model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prices = reference.price([make_group(["1", "2", "1", "1"]), make_group(["1"])])
    handle.remove()
    assert sum(rows) == 2
    assert prices[0][0] == prices[0][2] == prices[1][0]


def test_a_group_that_cannot_be_priced_is_named(reference: ReferenceModel) -> None:
    with pytest.raises(RecordError, match="tokens from 3 to 100000"):
        reference.price([make_group(), make_group(candidates=[make_candidate("x", tokens=[100_000])])])
    with pytest.raises(RecordError, match="no prompt tokens"):
        reference.price([make_group(prompt_tokens=[])])


def test_the_version_is_that_of_the_weights_wherever_they_lie(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    (copy / "tokenizer_config.json").write_text("{}")
    assert weights_version(copy) == weights_version(directory)
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert weights_version(copy) != weights_version(directory)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match=r"no config\.json"):
        ReferenceModel(tmp_path, batch_tokens=64)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(NotReadyError, match="did not load"):
        ReferenceModel(tmp_path, batch_tokens=64)
