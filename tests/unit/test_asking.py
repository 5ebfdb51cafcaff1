import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from streaming.asking import Answered, Answers, Panel
from streaming.errors import RecordError
from streaming.records import Group
from streaming.rewards import WeightedSource
from streaming.rewards.function import FunctionSource
from tests.builders import make_entry, make_group, make_prompt

WAIT_S = 60.0


class CountingReference:
    """Prices a response at minus its number of tokens; fails on the text "bad", or on everything once it is broken."""

    version = "counting"
    is_broken = False

    def logprobs(self, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        if self.is_broken:
            raise MemoryError("the device is gone")
        return [-float(len(response)) for _, response in examples]

    def price(self, groups: Sequence[Group]) -> list[list[float]]:
        if any(candidate.text == "bad" for group in groups for candidate in group.candidates):
            raise MemoryError("too much for me")
        return [self.logprobs([([0], candidate.tokens) for candidate in group.candidates]) for group in groups]


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def panel(
    *functions: Callable[..., Any], reference: CountingReference | None = None, timeout_s: float = WAIT_S
) -> Panel:
    sources = [
        WeightedSource(FunctionSource(function, name=f"s{i}", version="1", timeout_s=timeout_s), 1.0)
        for i, function in enumerate(functions)
    ]
    return Panel(sources, [reference or CountingReference()], max_groups=8)


def take(panel: Panel, count: int) -> list[Answered]:
    taken: list[Answered] = []
    while len(taken) < count:
        ready = panel.take(WAIT_S)
        assert ready, "nothing came"
        taken += ready
    return taken


def submit(panel: Panel, *groups: Group) -> None:
    for offset, group in enumerate(groups):
        panel.submit(make_entry(group, offset=offset), group)


def test_all_sources_and_the_reference_answer_about_a_group() -> None:
    with panel(lengths, lambda completions: [0.5] * len(completions)) as asked:
        submit(asked, make_group(["a", "bb"]))
        [answered] = take(asked, 1)
    assert isinstance(answered.answers, Answers)
    assert [source.values for source in answered.answers.rewards] == [[1.0, 2.0], [0.5, 0.5]]
    assert answered.answers.logprobs == [-2.0, -3.0]


def test_an_evaluation_request_is_not_priced() -> None:
    with panel(lengths) as asked:
        submit(asked, make_group(["bad"], request=make_prompt(purpose="eval")))
        [answered] = take(asked, 1)
    assert isinstance(answered.answers, Answers)
    assert answered.answers.logprobs is None


def test_a_slow_group_holds_up_no_other() -> None:
    release = threading.Event()

    def slow_on_the_first(completions: list[str], **_: Any) -> list[float]:
        if completions[0] == "slow":
            release.wait(WAIT_S)
        return [1.0] * len(completions)

    with panel(slow_on_the_first) as asked:
        submit(asked, make_group(["slow"]), *(make_group([str(number)]) for number in range(20)))
        first = take(asked, 20)
        release.set()
        last = take(asked, 1)
    assert [answered.entry.offset for answered in last] == [0]
    assert {answered.entry.offset for answered in first} == set(range(1, 21))


def test_a_source_that_fails_leaves_a_reason_and_the_other_sources_values() -> None:
    def fail(**_: Any) -> list[float]:
        raise ValueError("no")

    with panel(lengths, fail) as asked:
        submit(asked, make_group(["a"]))
        [answered] = take(asked, 1)
    assert isinstance(answered.answers, Answers)
    known, missing = answered.answers.rewards
    assert (known.values, known.reasons) == ([1.0], [])
    assert (missing.values, missing.reasons) == ([None], ["error"])


def test_a_group_that_a_working_reference_fails_on_is_a_bad_record_and_alone_so() -> None:
    with panel(lengths) as asked:
        submit(asked, *(make_group([text]) for text in ("a", "bad", "c", "d")))
        answers = {answered.entry.offset: answered.answers for answered in take(asked, 4)}
    assert isinstance(answers[1], RecordError)
    assert "too much for me" in str(answers[1])
    assert all(isinstance(answers[offset], Answers) for offset in (0, 2, 3))


def test_a_reference_that_fails_on_everything_is_no_records_fault() -> None:
    reference = CountingReference()
    reference.is_broken = True
    with panel(lengths, reference=reference) as asked:
        submit(asked, make_group(["a"]))
        with pytest.raises(MemoryError, match="the device is gone"):
            take(asked, 1)


def test_a_further_reference_that_cannot_price_a_group_keeps_it_from_nobody_else() -> None:
    class Strict(CountingReference):
        def price(self, groups: Sequence[Group]) -> list[list[float]]:
            raise RecordError("not my tokens", where="group", do="")

    with Panel([], [CountingReference(), Strict(), CountingReference()], max_groups=8) as asked:
        submit(asked, make_group(["a", "bb"]))
        [answered] = take(asked, 1)
    assert isinstance(answered.answers, Answers)
    assert answered.answers.logprobs == [-2.0, -3.0]
    assert answered.answers.further == [None, [-2.0, -3.0]]


def test_nothing_ready_is_nothing_taken() -> None:
    with panel(lengths) as asked:
        assert asked.take(0.01) == []


def test_closing_abandons_what_is_under_way() -> None:
    release = threading.Event()

    def slow(completions: list[str], **_: Any) -> list[float]:
        release.wait(WAIT_S)
        return [1.0] * len(completions)

    with panel(slow) as asked:
        submit(asked, make_group(["a"]))
        assert asked.take(0.05) == []
    release.set()
