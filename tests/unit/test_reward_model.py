import asyncio
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from deploy.tiny_model import build_tokenizer, save_tiny_model
from streaming.errors import NotReadyError
from streaming.records import Group, Message
from streaming.rewards.protocol import Reward
from streaming.rewards.reward_model import RewardModel
from tests.builders import make_candidate, make_group, make_prompt

MAX_TOKENS = 40
CHAT = make_prompt(text=None, messages=[Message(role="user", content="Hi")])


def save_reward_model(directory: Path, *, chat_template: bool = True) -> Path:
    tokenizer = build_tokenizer(chat_template=chat_template)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=MAX_TOKENS, num_labels=1, bos_token_id=None,
        pad_token_id=None, eos_token_id=tokenizer.eos_token_id, dtype="float32",
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def source(directory: Path) -> Iterator[RewardModel]:
    source = RewardModel(str(directory), name="taste", batch_tokens=64)
    yield source
    source.close()


def alone(directory: Path, text: str) -> float:
    """The model's output for one text, without padding."""
    model = LlamaForSequenceClassification.from_pretrained(directory).eval()
    tokens = AutoTokenizer.from_pretrained(directory)(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model.model(input_ids=tokens)[0][0, -1] @ model.score.weight[0])


def score(source: RewardModel, *groups: Group) -> list[list[Reward]]:
    async def all_of_them() -> list[list[Reward]]:
        return await asyncio.gather(*(source.score(group) for group in groups))

    return asyncio.run(all_of_them())


def test_padded_batches_give_the_rewards_of_each_text_alone(directory: Path, source: RewardModel) -> None:
    groups = [make_group(["2", "a longer answer", "2 or 3"]), make_group(["x"], number=3)]
    for group, rewards in zip(groups, score(source, *groups), strict=True):
        wanted = [alone(directory, f"{group.request.text}{candidate.text}") for candidate in group.candidates]
        assert [reward.value for reward in rewards] == pytest.approx(wanted, abs=1e-5)


def test_a_conversation_is_written_by_the_reward_models_template(directory: Path, source: RewardModel) -> None:
    [[reward]] = score(source, make_group(["yes"], request=CHAT))
    assert reward.value == pytest.approx(alone(directory, "<user>Hi\n<assistant>yes\n"), abs=1e-5)


def test_a_conversation_without_a_template_has_no_reward(tmp_path: Path) -> None:
    source = RewardModel(str(save_reward_model(tmp_path, chat_template=False)), name="taste", batch_tokens=64)
    chat, plain = score(source, make_group(["a", "b"], request=CHAT), make_group(["a"]))
    assert [reward.reason for reward in chat] == ["no_chat_template"] * 2
    assert plain[0].value is not None
    source.close()


def test_what_is_longer_than_the_model_takes_has_no_reward_and_the_rest_of_the_group_has(source: RewardModel) -> None:
    [rewards] = score(source, make_group(["a", "b" * MAX_TOKENS, "c"]))
    assert [reward.reason for reward in rewards] == [None, "too_long", None]
    assert rewards[0].value != rewards[2].value


def test_a_text_of_unknown_characters_fails_nobody(source: RewardModel) -> None:
    unknown = msgspec.structs.replace(make_candidate("2"), text="\u4f60")
    group = make_group(candidates=[unknown, make_candidate("2")])
    assert all(reward.value is not None for reward in score(source, group)[0])


def test_the_version_is_a_hash_of_the_weights(directory: Path, source: RewardModel) -> None:
    assert len(source.version) == 16


def test_a_model_without_a_trained_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match=r"no trained weights for score\.weight"):
        RewardModel(str(save_tiny_model(tmp_path)), name="taste", batch_tokens=64)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotReadyError, match="did not load"):
        RewardModel(str(tmp_path / "nothing"), name="taste", batch_tokens=64)
