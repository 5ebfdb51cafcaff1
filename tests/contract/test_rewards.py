"""What every reward source promises, held against each kind there is."""

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streaming.config import RewardSourceConfig, ScoringConfig
from streaming.records import Group, Message
from streaming.rewards import WeightedSource, build_rewards
from streaming.rewards.protocol import Reward, RewardSource
from tests.builders import make_candidate, make_group, make_prompt
from tests.unit.test_reward_model import save_reward_model

Build = Callable[..., WeightedSource]

KINDS = ["function", "coroutine", "model"]
CODE = """

def function(completions, completion_ids, **kwargs):
    return [float(sum(ids)) for ids in completion_ids]

async def coroutine(completions, completion_ids, **kwargs):
    return [float(sum(ids)) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "code.py").write_text(CODE)
    save_reward_model(folder / "model")
    return folder


@pytest.fixture(params=KINDS)
def build(request: pytest.FixtureRequest, folder: Path) -> Iterator[Build]:
    built: list[WeightedSource] = []

    def build(**settings: float) -> WeightedSource:
        kind = request.param
        where = {"model": str(folder / "model")} if kind == "model" else {"function": f"{folder / 'code.py'}:{kind}"}
        config = RewardSourceConfig.model_validate({"name": "test", **where, **settings})
        built.extend(build_rewards([config], ScoringConfig(batch_tokens=128)))
        return built[-1]

    yield build
    for one in built:
        one.source.close()


def score(source: RewardSource, *groups: Group) -> list[list[Reward]]:
    async def together() -> list[list[Reward]]:
        return await asyncio.gather(*(source.score(group) for group in groups))

    return asyncio.run(together())


def test_it_has_the_name_and_weight_of_its_settings_and_a_version(build: Build) -> None:
    source, weight = build(weight=0.5)
    assert (source.name, weight) == ("test", 0.5)
    assert source.version
    assert source.version == build().source.version


def test_every_candidate_has_a_finite_value_or_a_reason(build: Build) -> None:
    candidates = [make_candidate("a"), make_candidate("b" * 100, has_eos=False), make_candidate("", tokens=[])]
    [rewards] = score(build().source, make_group(candidates=candidates))
    assert len(rewards) == 3
    for value, reason in rewards:
        assert (value is None) != (reason is None)
        assert value is None or (isinstance(value, float) and math.isfinite(value))


def test_rewards_are_in_the_order_of_the_candidates(build: Build) -> None:
    source = build().source
    [together], *alone = score(source, make_group(["1", "22", "3"])), *(score(source, make_group([t])) for t in "13")
    assert together[0].value == pytest.approx(alone[0][0][0].value, abs=1e-5)
    assert together[2].value == pytest.approx(alone[1][0][0].value, abs=1e-5)
    assert together[0].value != together[1].value


def test_many_groups_at_once_get_each_their_own_rewards(build: Build) -> None:
    source = build(max_concurrency=2).source
    groups = [make_group([str(number), "x"], number=number) for number in range(20)]
    together = score(source, *groups)
    for group, rewards in zip(groups, together, strict=True):
        assert [reward.value for reward in rewards] == pytest.approx(
            [reward.value for reward in score(source, group)[0]], abs=1e-5
        )


def test_conversations_are_scored_too(build: Build) -> None:
    request = make_prompt(text=None, messages=[Message(role="user", content="Hi")])
    [rewards] = score(build().source, make_group(["a", "b"], request=request))
    assert all(reward.value is not None for reward in rewards)


@pytest.mark.fault("reward source hangs")
def test_a_deadline_that_passes_is_a_missing_reward(build: Build) -> None:
    [rewards] = score(build(timeout_s=1e-6).source, make_group())
    assert {reward.reason for reward in rewards} <= {None, "timeout"}
    assert len(rewards) == 2
