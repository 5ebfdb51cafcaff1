"""One call of every reward function before a run begins, on a prompt of the run: what is wrong shows here, with its
line, and not as a thousand missing rewards later.

Beyond this call a reward that fails is a missing reward with its reason; the run goes on (see streaming/rewards).
"""

import asyncio
import threading
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from actors.prompts import Prompt
from streaming.config import RewardSourceConfig
from streaming.errors import DataError
from streaming.records import Candidate, Group, PromptRequest, Span, Version
from streaming.rewards.function import accepted_keywords, is_async, keywords_of
from streaming.rewards.loading import load_function
from streaming.rewards.protocol import checked

ANSWERS = ("42", "An answer in words.")
"""What the trial pretends that the model wrote: models write numbers and prose, whatever they are asked."""


def try_reward(config: RewardSourceConfig, prompt: Prompt) -> str:
    """Call a reward function once and say what it gave. Raises DataError where its answer breaks the contract."""
    assert config.function is not None, "only functions are tried"
    function, _ = load_function(config.function)
    group = _pretended_group(prompt)
    keywords = keywords_of(group)
    accepted = accepted_keywords(function)
    if accepted is not None:
        keywords = {name: value for name, value in keywords.items() if name in accepted}
    where = f"reward {config.name!r} ({config.function})"
    returned = _call(function, keywords, where=where, timeout_s=config.timeout_s)
    return _judge(returned, len(group.candidates), where)


def _pretended_group(prompt: Prompt) -> Group:
    texts = ([prompt.golden] if prompt.golden else []) + list(ANSWERS)
    request = PromptRequest(
        number=0,
        prompt_id=prompt.prompt_id,
        num_candidates=len(texts),
        text=prompt.text,
        messages=prompt.messages,
        golden=prompt.golden,
        columns=prompt.columns,
    )
    span = Span(version=Version(0, 0), start=0, end=1)
    candidates = [
        Candidate(tokens=[0], logprobs=[0.0], text=text, finish_reason="stop", has_eos=True, spans=[span])
        for text in texts
    ]
    return Group(request=request, prompt_tokens=[0], candidates=candidates, policy="trial", generator="", sampled_s=0.0)


def _call(function: Any, keywords: dict[str, Any], *, where: str, timeout_s: float) -> Any:
    """In a thread of its own, so that a function that hangs is named instead of hanging the command."""
    outcome: list[Any] = []
    raised: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(asyncio.run(function(**keywords)) if is_async(function) else function(**keywords))
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=call, name="reward-trial", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if raised:
        raise DataError(
            f"raised {type(raised[0]).__name__}: {raised[0]}{_place(raised[0])}",
            where=where,
            do="Mend it. A model may write anything: return None for an answer that cannot be judged.",
        ) from raised[0]
    if not outcome:
        raise DataError(
            f"took longer than {timeout_s:g} s for one prompt",
            where=where,
            do="Mend it, or raise rewards.timeout_s.",
        )
    return outcome[0]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "asyncio" not in frame.filename]
    return f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""


def _judge(returned: Any, count: int, where: str) -> str:
    do = "Return a list with one float, or None, per completion."
    if isinstance(returned, str | bytes | Mapping) or not isinstance(returned, Iterable):
        raise DataError(f"returned {type(returned).__name__}, not a list", where=where, do=do)
    values = list(returned)
    if len(values) != count:
        raise DataError(f"returned {len(values)} rewards for {count} completions", where=where, do=do)
    for value, reward in zip(values, checked(values), strict=True):
        if reward.reason == "non_finite":
            raise DataError(f"returned {float(value)}", where=where, do="Return None for what cannot be judged.")
        if reward.reason == "wrong_type":
            raise DataError(f"returned {value!r} among the rewards", where=where, do=do)
    return f"gave {', '.join('None' if value is None else f'{float(value):g}' for value in values)} on trial"
