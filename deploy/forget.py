"""One prompt's data, deleted: `streamdpo forget RUN PROMPT_ID`.

    named (RUN/forgotten.txt) -> its texts, tokens and answers overwritten in the log -> its blobs removed -> told

From then on the prompt is not sampled any more: its requests end as dropped, reason `forgotten`. Ids, request numbers
and endings stay, so that the books balance; they hold nothing that a person wrote. A crash anywhere is mended by doing
it again. What cannot be deleted is named: records that lie in Kafka itself until their retention has passed, weights
and checkpoints that were trained on it, copies.
"""

import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from actors.scheduler import Prompts
from deploy import forgotten_blobs
from deploy.config import RunConfig
from deploy.forgotten_blobs import Removed
from deploy.lock import only_launcher
from deploy.status import is_live
from streaming import topics
from streaming.endings import FORGOTTEN
from streaming.errors import ConfigError, NotReadyError, RecordError
from streaming.heartbeat import role_states
from streaming.history import entries, records
from streaming.log.protocol import Entry, Log
from streaming.log.sqlite import SQLiteLog
from streaming.records import (
    DeadLetter,
    Feedback,
    Group,
    Pair,
    PromptRequest,
    Record,
    Response,
    ScoredGroup,
    WeightVersion,
    decode,
    encode,
)
from streaming.weights import write_durably

NAME = "forgotten.txt"
"""In the run's directory: a prompt id a line."""

DAY_S = 24 * 3600
"""Added to what brokers keep: they look for old segments now and then, and their clocks differ."""


class Forgotten(NamedTuple):
    """What became of a prompt's data."""

    prompt_id: str
    deleted: dict[str, int]  # topic -> records whose content is gone
    left: list[str]  # what could not be deleted, in words
    blobs: Removed | None = None  # the large ones among them; None where this run has no blobs


class _Found(NamedTuple):
    """A record with content of the prompt."""

    entry: Entry
    record: Record
    blob: str | None  # its name, where the value lies beside the log


def forget(config: RunConfig, prompt_id: str, log: Log, directory: Path) -> Forgotten:
    """Delete what can be deleted of this prompt, and never sample it again.

    Doing it again is no harm, and needed where a backup was put back. Raises NotReadyError while the run is running
    (its roles hold what they read), ConfigError where neither the log nor an earlier call knows the prompt.
    """
    with only_launcher(directory):
        _refuse_while_running(log)
        found = {topic: _of_prompt(log, topic, prompt_id) for topic in _topics(config)}
        if not any(found.values()) and prompt_id not in forgotten(directory):
            raise ConfigError(
                f"the log knows no prompt {prompt_id}", where="PROMPT_ID", do="`streamdpo tail prompts` shows the ids."
            )
        names = sorted({*forgotten(directory), prompt_id})
        write_durably(directory / NAME, "".join(f"{name}\n" for name in names).encode())
        left = [*_left_in_log(config, log, found), *_left_elsewhere(log, directory, found, prompt_id)]
        deleted = _erase(log, found)
        return Forgotten(prompt_id, deleted, left, _remove_blobs(log, found, prompt_id))


def told(found: Forgotten) -> str:
    """For people, a line each."""
    lines = [f"deleted: the content of {count} records in {topic}" for topic, count in found.deleted.items()]
    if found.blobs is not None:
        size = f"{found.blobs.num_bytes / 1e6:.1f} MB"
        lines.append(f"deleted: {found.blobs.num_blobs} blobs of large records, {size}, in {found.blobs.url}")
    lines += [f"from now on {found.prompt_id} is dropped, reason forgotten"]
    return "\n".join([*lines, *(f"NOT deleted: {left}" for left in found.left)])


def forgotten(directory: Path) -> set[str]:
    """The prompts of this run that are forgotten."""
    path = directory / NAME
    return set(path.read_text().split()) if path.exists() else set()


def without_forgotten(prompts: Prompts, names: Collection[str]) -> Prompts:
    """The data without what is forgotten. A training prompt keeps its place, empty, so that the order stays."""
    empty = [
        dataclasses.replace(one, text=None, messages=None, golden=None, columns={}) if one.prompt_id in names else one
        for one in prompts.train
    ]
    return Prompts(empty, [one for one in prompts.held_out if one.prompt_id not in names])


def redacted(record: Record) -> Record:
    """A record without anything that a person or a model wrote: ids, numbers and versions stay."""
    replace = msgspec.structs.replace
    match record:
        case PromptRequest():
            return replace(record, text=None, messages=None, golden=None, columns={})
        case Group():
            return replace(record, request=redacted(record.request), prompt_tokens=[], candidates=[])
        case ScoredGroup():
            group = redacted(record.group)
            return replace(record, group=group, rewards=[], reference_logprobs=[], implicit=[], further=[])
        case Pair():
            rejected = None if record.rejected is None else _empty(record.rejected)
            return replace(record, prompt_tokens=[], prompt_text="", chosen=_empty(record.chosen), rejected=rejected)
        case DeadLetter():
            return replace(record, value=b"", reason=FORGOTTEN)
    return record


def _empty(response: Response) -> Response:
    return msgspec.structs.replace(response, tokens=[], text="", spans=[])


def _refuse_while_running(log: Log) -> None:
    live = [state.role_id for state in role_states(log).values() if is_live(state, time.time())]
    if live:
        raise NotReadyError(
            f"the run is running: {', '.join(live)}",
            where="run",
            do="Stop it first: its roles hold what they have read.",
        )


def _topics(config: RunConfig) -> list[topics.Topic]:
    policies = [policy.name for policy in config.every_policy]
    content = (PromptRequest, Group, ScoredGroup, Pair, DeadLetter)
    return [topic for topic in topics.all_topics(*policies) if topic.record in content]


def _of_prompt(log: Log, topic: topics.Topic, prompt_id: str) -> list[_Found]:
    """Every entry of a topic that holds content of this prompt."""
    blobs = forgotten_blobs.names_at(log, topic.name)
    found = []
    for entry in entries(log, topic.name):
        record = _content(topic, entry.value, prompt_id)
        if record is not None:
            found.append(_Found(entry, record, blobs.get((entry.partition, entry.offset))))
    return found


def _content(topic: topics.Topic, value: bytes, prompt_id: str) -> Record | None:
    """The record in these bytes, where it holds content of the prompt."""
    try:
        record = decode(topic.record, value)
    except RecordError:  # bytes that nobody could read lie in the dead letters too
        return None
    return record if _prompt_of(record, prompt_id) == prompt_id and redacted(record) != record else None


def _prompt_of(record: Record, prompt_id: str) -> str | None:
    match record:
        case PromptRequest() | Pair():
            return record.prompt_id
        case Group():
            return record.request.prompt_id
        case ScoredGroup():
            return record.group.request.prompt_id
        case DeadLetter():
            return prompt_id if prompt_id.encode() in (record.key + record.value) else None
    return None


def _erase(log: Log, found: dict[topics.Topic, list[_Found]]) -> dict[str, int]:
    """Records whose content goes, by topic: on a cluster those whose values are blobs."""
    bare = _embedded(log)
    deleted = {}
    for topic, held in found.items():
        if bare is not None:
            bare.rewrite(one.entry._replace(value=encode(redacted(one.record))) for one in held)
        deleted[topic.name] = len([one for one in held if bare is not None or one.blob is not None])
    return {name: count for name, count in deleted.items() if count}


def _remove_blobs(log: Log, found: dict[topics.Topic, list[_Found]], prompt_id: str) -> Removed | None:
    known = {one.blob for held in found.values() for one in held if one.blob is not None}
    rows = {topic.name: topic for topic in found}
    return forgotten_blobs.remove(
        log, rows, known, lambda topic, value: _content(rows[topic], value, prompt_id) is not None
    )


def _embedded(log: Log) -> SQLiteLog | None:
    """The file behind a log; None for a cluster."""
    bare = getattr(log, "bare", log)
    return bare if isinstance(bare, SQLiteLog) else None


def _left_in_log(config: RunConfig, log: Log, found: dict[topics.Topic, list[_Found]]) -> Iterator[str]:
    """What a cluster keeps: nobody can delete single records of a topic that is not compacted."""
    held = {topic: kept for topic, all_ in found.items() if (kept := [one for one in all_ if one.blob is None])}
    if _embedded(log) is not None or not held:
        return
    from streaming.log.kafka_topics import longest_kept_s

    kept_s = longest_kept_s(config.log, config.name, list(held))
    for topic, left in held.items():
        newest_s = max(one.entry.time_s for one in left)
        yield f"{len(left)} records of topic {topic.name}: {_gone(newest_s, kept_s, topic)}"


def _gone(newest_s: float, kept_s: Mapping[str, float | None], topic: topics.Topic) -> str:
    if topic.name not in kept_s:
        return "until its retention has passed, which this user may not see (the right DescribeConfigs)"
    longest_s = kept_s[topic.name]
    if longest_s is None:
        return "kept for ever, its retention.ms is -1"
    return f"kept until {time.strftime('%Y-%m-%d', time.localtime(newest_s + longest_s + DAY_S))} at the longest"


def _left_elsewhere(
    log: Log, directory: Path, found: dict[topics.Topic, list[_Found]], prompt_id: str
) -> Iterator[str]:
    told = [one for _, one in records(log, topics.FEEDBACK.name, Feedback) if one.prompt_id == prompt_id]
    steps = sorted({(one.epoch, one.step) for one in told if one.ending == "consumed" and not one.reason})
    if steps:
        first = ", ".join(f"{step} (epoch {epoch})" for epoch, step in steps[:5])
        yield (
            f"weights: it was in {len(steps)} gradient steps, the first are {first}; every version and checkpoint "
            f"since has learned from it, in {directory / 'weights'}, {directory / 'checkpoints'}, best and last"
        )
    if _is_probed(log, found):
        yield f"the parity probe of a published version: its tokens, in topic weights and {directory / 'checkpoints'}"
    yield f"pages, exports and log files made before: {directory / 'report.html'}, {directory / 'logs'}"
    yield "the data set itself, backups and copies: delete it there too, and forget it again after a restore"


def _is_probed(log: Log, found: dict[topics.Topic, list[_Found]]) -> bool:
    """Whether generators compare their log-probs on an example of this prompt."""
    prompts = [
        tuple(one.record.prompt_tokens)
        for held in found.values()
        for one in held
        if isinstance(one.record, Group | Pair)
    ]
    published = records(log, topics.WEIGHTS.name, WeightVersion)
    return any(one.probe is not None and tuple(one.probe.prompt_tokens) in prompts for _, one in published)
