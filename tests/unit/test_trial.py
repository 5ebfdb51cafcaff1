from pathlib import Path

import pytest

from actors.prompts import Prompt
from deploy.trial import try_reward
from streaming.config import RewardSourceConfig
from streaming.errors import DataError
from streaming.records import Message

TEXT = Prompt(prompt_id="p", text="1+1=", golden="2", columns={"answer": 2})
CHAT = Prompt(prompt_id="p", messages=[Message(role="user", content="Hi")], columns={})


def tried(folder: Path, body: str, prompt: Prompt = TEXT, **settings) -> str:
    """What a trial of `def score` with this body gives."""
    (folder / "reward.py").write_text(f"import time\n{body}\n")
    config = RewardSourceConfig(name="mine", function=f"{folder}/reward.py:score", **settings)
    return try_reward(config, prompt)


def error_of(folder: Path, body: str, **settings) -> str:
    with pytest.raises(DataError) as caught:
        tried(folder, body, **settings)
    return str(caught.value)


def test_a_reward_gets_the_prompts_columns_and_gives_one_value_per_completion(tmp_path):
    body = (
        "def score(prompts, completions, answer, **rest):\n    return [a * len(c) for a, c in zip(answer, completions)]"
    )
    assert tried(tmp_path, body) == "gave 2, 4, 38 on trial"


def test_a_conversation_comes_as_messages(tmp_path):
    body = "def score(prompts, completions, **rest):\n    return [len(c[0]['content']) for c in completions]"
    assert tried(tmp_path, body, CHAT) == "gave 2, 19 on trial"


def test_a_coroutine_is_awaited(tmp_path):
    assert (
        tried(tmp_path, "async def score(completions, **rest):\n    return [None, 1, 2]") == "gave None, 1, 2 on trial"
    )


def test_what_a_reward_raises_is_shown_with_its_line(tmp_path):
    text = error_of(tmp_path, "def score(completions, **rest):\n    return [1 / 0]")
    assert text.startswith(f"reward 'mine' ({tmp_path}/reward.py:score): raised ZeroDivisionError: division by zero")
    assert f"(at {tmp_path}/reward.py:3)" in text


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ("[1.0]", "returned 1 rewards for 3 completions"),
        ("[1.0] * 4", "returned 4 rewards for 3 completions"),
        ("[1.0, float('nan'), 1.0]", "returned nan"),
        ("[1.0, float('inf'), 1.0]", "returned inf"),
        ("['good', 'bad', 'ugly']", "returned 'good' among the rewards"),
        ("1.0", "returned float, not a list"),
        ("None", "returned NoneType, not a list"),
    ],
)
def test_what_breaks_the_contract_is_named(tmp_path, returned, what):
    assert what in error_of(tmp_path, f"def score(completions, **rest):\n    return {returned}")


def test_a_reward_that_hangs_is_named_instead_of_hanging_the_command(tmp_path):
    text = error_of(tmp_path, "def score(completions, **rest):\n    time.sleep(60)", timeout_s=0.05)
    assert "took longer than 0.05 s for one prompt" in text


def test_a_function_that_is_not_there_is_named_with_those_that_are(tmp_path):
    text = error_of(tmp_path, "def scores(completions, **rest):\n    return [1.0]")
    assert "has no score" in text
    assert "scores" in text
