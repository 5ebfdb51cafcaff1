"""A look into the log: `streamdpo tail`. It reads outside every group, so it disturbs nobody."""

import time
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

import msgspec

from streaming import topics
from streaming.errors import ConfigError, RecordError
from streaming.history import before
from streaming.log.protocol import Entry, Log, Offsets
from streaming.records import Record, decode
from streaming.topics import Topic

WAIT_S = 0.5
"""Longest wait for a new entry before the reader looks whether it shall stop."""

READ_RECORDS = 256
"""Entries per read: enough for speed, few enough to print at once."""


def find_topic(name: str, *policies: str) -> Topic:
    """The topic of this name; `pairs` alone means the first policy's. Raises ConfigError with the names that exist."""
    every = {topic.name: topic for topic in topics.all_topics(*policies)}
    every["pairs"] = topics.pairs(policies[0])
    if name not in every:
        raise ConfigError(
            f"there is no topic {name!r}", where="tail", do=f"The topics are: {', '.join(sorted(every))}."
        )
    return every[name]


def newest_entries(log: Log, ends: Offsets, count: int) -> list[Entry]:
    """The last `count` entries before `ends`, by time."""
    found = sorted(before(log, ends, count), key=lambda entry: (entry.time_s, entry.partition, entry.offset))
    return found[-count:] if count else []


def follow(log: Log, ends: Offsets, stop: Event) -> Iterator[Entry]:
    """Everything that is appended from `ends` on, until `stop`."""
    with log.assign(ends) as consumer:
        while not stop.is_set():
            yield from consumer.read(max_records=READ_RECORDS, timeout_s=WAIT_S)


def line(entry: Entry, kind: type[Record], *, fields: Sequence[str] = ()) -> str:
    """An entry as one line of JSON: its place, its time, its record (or only these fields of it).

    What is no record stands there with the reason.
    """
    shown = {
        "at": entry.where,
        "time": time.strftime("%H:%M:%S", time.localtime(entry.time_s)),
        "key": entry.key.decode(errors="replace"),
        **_content(entry, kind, fields),
    }
    return msgspec.json.encode(shown, enc_hook=_text).decode()


def _content(entry: Entry, kind: type[Record], fields: Sequence[str]) -> dict[str, Any]:
    try:
        record = msgspec.to_builtins(decode(kind, entry.value, where=entry.where), builtin_types=())
    except RecordError as error:
        return {"unreadable": error.what}
    return {name: _at(record, name) for name in fields} if fields else record


def _at(record: Any, path: str) -> Any:
    """The value at a path like `group.request.number`; None where there is none."""
    for part in path.split("."):
        if isinstance(record, list):
            record = record[int(part)] if part.isdigit() and int(part) < len(record) else None
        else:
            record = record.get(part) if isinstance(record, dict) else None
    return record


def _text(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else repr(value)
