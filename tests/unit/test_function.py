import asyncio
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import numpy
import pytest
import torch

from streaming.errors import DataError
from streaming.records import Group, Message
from streaming.rewards.function import FunctionSource, is_async, keywords_of
from streaming.rewards.loading import load_function
from streaming.rewards.protocol import Reward
from tests.builders import make_candidate, make_group, make_prompt

WAIT_S = 60.0


def source(function: Callable[..., Any], **fields: Any) -> FunctionSource:
    return FunctionSource(function, **{"name": "test", "version": "1", **fields})


def score(function: Callable[..., Any], group: Group | None = None, **fields: Any) -> list[Reward]:
    asked = source(function, **fields)
    try:
        return asyncio.run(asked.score(group or make_group(["a", "b"])))
    finally:
        asked.close()


def reasons(rewards: list[Reward]) -> list[str | None]:
    assert all((reward.value is None) == (reward.reason is not None) for reward in rewards)
    return [reward.reason for reward in rewards]


def test_a_function_for_trl_is_called_as_trl_calls_it() -> None:
    seen: dict[str, Any] = {}

    def reward(prompts, completions, completion_ids, answer, **kwargs):  # type: ignore[no-untyped-def]
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer)
        return [0.25, 1]

    group = make_group(["a", "b"], request=make_prompt(text="1+1=", columns={"answer": 2, "prompt": "not this"}))
    assert score(reward, group) == [Reward(0.25), Reward(1.0)]
    assert seen["prompts"] == ["1+1=", "1+1="]
    assert seen["completions"] == ["a", "b"]
    assert seen["completion_ids"] == [candidate.tokens for candidate in group.candidates]
    assert seen["answer"] == [2, 2]
    assert "prompt" not in seen
    seen["log_extra"]("column", [1, 2])
    seen["log_metric"]("name", 1.0)


def test_the_reward_functions_that_come_with_trl_work_as_they_are() -> None:
    request = make_prompt(text=None, messages=[Message(role="user", content="Hi")])
    thinking = msgspec.structs.replace(make_candidate("a"), text="<think>well</think>a")
    group = make_group(candidates=[thinking, make_candidate("a")], request=request)
    assert score(load_function("trl.rewards:think_format_reward").function, group) == [Reward(1.0), Reward(0.0)]
    overlong = load_function("trl.rewards:get_soft_overlong_punishment").function
    assert score(overlong(max_completion_len=2, soft_punish_cache=1), group) == [Reward(-1.0), Reward(-1.0)]


def test_a_conversation_comes_as_messages() -> None:
    request = make_prompt(text=None, messages=[Message(role="user", content="Hi")])
    keywords = keywords_of(make_group(["a", "b"], request=request))
    assert keywords["prompts"] == [[{"role": "user", "content": "Hi"}]] * 2
    assert keywords["completions"] == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]


def test_a_golden_answer_is_a_column_unless_the_data_has_one_of_that_name() -> None:
    assert keywords_of(make_group(request=make_prompt(golden="2")))["golden"] == ["2", "2"]
    assert keywords_of(make_group(request=make_prompt(golden="2", columns={"golden": 3})))["golden"] == [3, 3]


def test_a_function_is_given_only_the_keywords_that_it_names() -> None:
    assert score(lambda completions: [len(text) for text in completions]) == [Reward(1.0), Reward(1.0)]


def test_coroutines_are_awaited() -> None:
    async def reward(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0, 0.0]

    assert score(reward) == [Reward(1.0), Reward(0.0)]


def test_async_is_seen_through_partials_and_instances() -> None:
    class Judge:
        async def __call__(self, completions: list[str], strictness: int, **_: Any) -> list[float]:
            return [float(strictness)] * len(completions)

    judge = functools.partial(Judge(), strictness=3)
    assert is_async(judge)
    assert score(judge) == [Reward(3.0), Reward(3.0)]
    assert not is_async(lambda: None)


@pytest.mark.parametrize(
    "values", [(1, True), numpy.array([1.0, 1.0]), torch.ones(2), [numpy.float32(1), torch.tensor(1)]]
)
def test_numbers_of_any_library_are_rewards(values: Any) -> None:
    assert score(lambda **_: values) == [Reward(1.0), Reward(1.0)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, None], [None, "not_applicable"]),
        ([float("nan"), float("-inf")], ["non_finite", "non_finite"]),
        (["1.0", object()], ["wrong_type", "wrong_type"]),
        ([1.0], ["wrong_count", "wrong_count"]),
        ([1.0] * 3, ["wrong_count", "wrong_count"]),
        (None, ["wrong_type", "wrong_type"]),
        (1.0, ["wrong_type", "wrong_type"]),
        ("ab", ["wrong_type", "wrong_type"]),
    ],
)
@pytest.mark.fault("reward source lies")
def test_what_is_not_a_reward_is_missing_with_its_reason(values: Any, expected: list[str | None]) -> None:
    assert reasons(score(lambda **_: values)) == expected


@pytest.mark.fault("reward source raises")
def test_an_error_is_missing_rewards_and_its_traceback_is_shown_once(caplog: pytest.LogCaptureFixture) -> None:
    def reward(**_: Any) -> list[float]:
        raise KeyError("no such column")

    asked = source(reward)

    async def twice() -> list[list[Reward]]:
        return [await asked.score(make_group()), await asked.score(make_group())]

    with caplog.at_level(logging.ERROR):
        assert [reasons(rewards) for rewards in asyncio.run(twice())] == [["error", "error"]] * 2
    assert len(caplog.records) == 1
    assert "no such column" in caplog.text
    assert "Traceback" in caplog.text
    asked.close()


@pytest.mark.parametrize("error", [SystemExit(1), StopIteration(), TimeoutError()])
@pytest.mark.fault("reward source raises")
def test_no_exception_of_a_function_gets_through(error: BaseException) -> None:
    def reward(**_: Any) -> list[float]:
        raise error

    assert reasons(score(reward)) == ["error", "error"]


def test_a_slow_call_holds_up_no_other() -> None:
    release = threading.Event()

    def reward(completions: list[str], **_: Any) -> list[float]:
        if completions[0] == "slow":
            release.wait(WAIT_S)
        return [1.0] * len(completions)

    asked = source(reward, max_concurrency=2)

    async def both() -> None:
        slow = asyncio.create_task(asked.score(make_group(["slow"])))
        assert await asked.score(make_group(["quick"])) == [Reward(1.0)]
        assert not slow.done()
        release.set()
        assert await slow == [Reward(1.0)]

    asyncio.run(both())
    asked.close()


@pytest.mark.fault("reward source hangs")
def test_a_slow_coroutine_is_cancelled_at_its_deadline() -> None:
    cancelled = threading.Event()

    async def reward(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return [1.0, 1.0]

    asked = source(reward, timeout_s=0.05)
    assert reasons(asyncio.run(asked.score(make_group()))) == ["timeout", "timeout"]
    assert cancelled.wait(WAIT_S)
    asked.close()


@pytest.mark.fault("reward source hangs")
def test_a_coroutine_that_blocks_its_loop_still_meets_its_deadline() -> None:
    release = threading.Event()

    async def reward(**_: Any) -> list[float]:
        release.wait(WAIT_S)
        return [1.0, 1.0]

    asked = source(reward, timeout_s=0.05)
    assert reasons(asyncio.run(asked.score(make_group()))) == ["timeout", "timeout"]
    release.set()
    asked.close()


@pytest.mark.fault("reward source hangs")
def test_where_every_call_hangs_further_ones_time_out_instead_of_waiting_for_ever() -> None:
    release, started = threading.Event(), []

    def reward(**_: Any) -> list[float]:
        started.append(1)
        release.wait(WAIT_S)
        return [1.0, 1.0]

    asked = source(reward, timeout_s=0.05, max_concurrency=2)

    async def five() -> list[list[Reward]]:
        return await asyncio.gather(*(asked.score(make_group()) for _ in range(5)))

    assert [reasons(rewards) for rewards in asyncio.run(five())] == [["timeout", "timeout"]] * 5
    assert len(started) == 2
    release.set()
    asked.close()


def test_waiting_for_a_slot_is_not_held_against_a_call() -> None:
    turn = threading.Lock()

    def reward(**_: Any) -> list[float]:
        with turn:
            threading.Event().wait(0.1)
        return [1.0, 1.0]

    asked = source(reward, timeout_s=1.0, max_concurrency=1)

    async def twelve() -> list[list[Reward]]:
        return await asyncio.gather(*(asked.score(make_group()) for _ in range(12)))

    assert asyncio.run(twelve()) == [[Reward(1.0), Reward(1.0)]] * 12
    asked.close()


def test_a_function_that_needs_the_trainer_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="trainer_state"):
        source(lambda completions, trainer_state: [0.0])


def test_a_function_that_could_use_the_trainer_works_without() -> None:
    assert score(lambda completions, trainer_state=None: [0.5, 0.5]) == [Reward(0.5), Reward(0.5)]


def test_truncated_and_empty_answers_are_scored_like_any_other() -> None:
    group = make_group(candidates=[make_candidate("", tokens=[]), make_candidate("a", has_eos=False)])
    assert score(lambda completions: [len(text) for text in completions], group) == [Reward(0.0), Reward(1.0)]
