"""A recorded run: what scheduler, generator, scorer, selector and learner would have written, with the true places."""

from collections.abc import Sequence
from typing import Any

from streaming import topics
from streaming.config import SelectionConfig
from streaming.endings import end
from streaming.keys import pair_key
from streaming.log.protocol import Log, Output
from streaming.records import Feedback, Pair, PromptRequest, Record, ScoredGroup, Source, encode
from streaming.selector import STAGE, select
from tests.builders import make_feedback, make_group, make_prompt, make_scored

SETTINGS = SelectionConfig(rule="max_min")


def append(log: Log, topic: str, key: str, record: Record) -> Source:
    """Write one record; where it lies."""
    [(partition, offset)] = log.append([Output(topic, key.encode(), encode(record))])
    return Source(topic=topic, partition=partition, offset=offset)


def record_request(
    log: Log,
    number: int = 0,
    rewards: Sequence[float | None] = (1.0, 0.0),
    *,
    settings: SelectionConfig = SETTINGS,
    texts: Sequence[str] | None = None,
    **request: Any,
) -> Pair | None:
    """A request on its whole way to the learner; the pair, or None where the selector dropped it (and said so)."""
    scored = record_scored(log, number, rewards, texts=texts, **request)
    return record_selection(log, scored, settings)


def record_scored(
    log: Log, number: int, rewards: Sequence[float | None], *, texts: Sequence[str] | None = None, **request: Any
) -> tuple[ScoredGroup, Source]:
    """A request on its way to the selector."""
    asked: PromptRequest = make_prompt(number, num_candidates=len(rewards), **request)
    source = append(log, topics.PROMPTS.name, asked.prompt_id, asked)
    names = texts or [f"answer {index}" for index in range(len(rewards))]
    group = make_group([text.replace(" ", "-") for text in names], request=asked, source=source)
    source = append(log, topics.CANDIDATES.name, group.group_id, group)
    scored = make_scored(rewards, group=group, source=source)
    return scored, append(log, topics.SCORED.name, group.group_id, scored)


def record_selection(log: Log, written: tuple[ScoredGroup, Source], settings: SelectionConfig) -> Pair | None:
    """What the selector makes of a scored group."""
    scored, source = written
    selection = select(scored, settings, policy="policy", source=source)
    if selection.pair is not None:
        append(log, topics.pairs("policy").name, pair_key(selection.pair).decode(), selection.pair)
        return selection.pair
    request, reason = scored.group.request, selection.decision.reason
    dropped = end(request, "dropped", policy="policy", stage=STAGE, reason=reason, time_s=0.0, route="drop")
    append(log, topics.FEEDBACK.name, scored.group.group_id, dropped)
    return None


def record_step(log: Log, pair: Pair, *, step: int = 1, is_durable: bool = True, **fields: Any) -> None:
    """A pair in a gradient step, and in the checkpoint after it."""
    for ending in ["consumed", "trained"][: 1 + is_durable]:
        append(log, topics.FEEDBACK.name, pair.group_id, trained(pair, ending=ending, step=step, **fields))


def trained(pair: Pair, *, ending: str = "trained", step: int = 1, **fields: Any) -> Feedback:
    """What the learner says about a pair."""
    return make_feedback(
        pair.request_number, ending=ending, stage="learner", epoch=1, step=step, loss=0.5, pair_id=pair.pair_id,
        content_hash=pair.content_hash, route=pair.route, **{"group_id": pair.group_id, **fields},
    )  # fmt: skip
