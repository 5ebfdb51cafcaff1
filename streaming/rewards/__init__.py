"""Reward sources: what an answer is worth, or the reason why nobody knows.

`build_rewards` is the table: a row per kind of source. `protocol` says what every source promises, `function` and
`reward_model` are the sources, `loading` finds people's functions, `rules` are functions that come with us.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from streaming.config import RewardSourceConfig, ScoringConfig
from streaming.rewards.protocol import RewardSource


class WeightedSource(NamedTuple):
    """A source and its weight in the combined reward."""

    source: RewardSource
    weight: float


def build_rewards(
    configs: Sequence[RewardSourceConfig], scoring: ScoringConfig, *, trust_remote_code: bool = False
) -> list[WeightedSource]:
    """Load every source, in order.

    Raises DataError for a function that is not there or cannot be called, NotReadyError for a model that does not
    load. What was already loaded is closed again.
    """
    sources: list[WeightedSource] = []
    with ExitStack() as unfinished:
        for config in configs:
            source = _build(config, scoring, trust_remote_code)
            unfinished.callback(source.close)
            sources.append(WeightedSource(source, config.weight))
        unfinished.pop_all()
    return sources


def _build(config: RewardSourceConfig, scoring: ScoringConfig, trust_remote_code: bool) -> RewardSource:
    if config.function is not None:
        from streaming.rewards.function import FunctionSource
        from streaming.rewards.loading import load_function

        function, version = load_function(config.function)
        return FunctionSource(
            function,
            name=config.name,
            version=version,
            timeout_s=config.timeout_s,
            max_concurrency=config.max_concurrency,
        )
    from streaming.rewards.reward_model import RewardModel

    assert config.model is not None, "a source is a function or a model"
    return RewardModel(
        config.model,
        name=config.name,
        batch_tokens=scoring.batch_tokens,
        timeout_s=config.timeout_s,
        num_threads=scoring.num_threads,
        trust_remote_code=trust_remote_code,
    )
