"""Stored bytes of every record that travels, for ever: `python -m tests.stored_records` adds those that are missing.

What is there is never written again: a run's log holds such bytes, and every later release has to read them.
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from streaming import records, topics
from streaming.records import Record, decode, encode
from tests import builders

FOLDER = Path(__file__).parent / "stored"


class Stored(NamedTuple):
    """One record as some release wrote it."""

    name: str
    kind: type[Record]
    value: bytes
    said: dict[str, Any]  # what it said then


def examples() -> list[Record]:
    """One record of every topic, with something in most of its fields."""
    version, source = records.Version(2, 7), records.Source(topic="prompts", partition=1, offset=5)
    request = builders.make_prompt(
        3, sampling=records.Sampling(temperature=0.5, stop=["\n"]), golden="4", columns={"answer": 4}, ordinal=2
    )
    group = builders.make_group(["4", "5"], request=request, version=version, source=source)
    feedback = builders.make_feedback(
        3, epoch=2, step=9, staleness=1, loss=0.5, pair_id="pair", content_hash="hash", route="dpo", told_by=3
    )
    probe = records.Probe(prompt_tokens=[3, 4], response_tokens=[5], logprobs=[-0.5])
    fence = records.Fence(epoch=2, ends=[(0, 10), (1, 12)])
    return [
        request,
        group,
        builders.make_scored([1.0, None], group=group, source=source),
        builders.make_pair(3, version=version, source=source, spread=0.5, weight=0.5, num_examples=2),
        feedback,
        builders.make_weights(version, lineage=[records.Version(1, 4)], probe=probe, fences=[fence], time_s=12.5),
        builders.make_role("learner", epoch=2, version=version, leases=[version], numbers={"step": 9.0}),
        records.CarriedBalance(policy="policy", issued=[(0, 9)], endings=[("trained", "", 4)], next_ordinal=7),
        records.DeadLetter(
            stage="scorer", source=source, key=b"k", value=b"\xc1", reason="broken", attempts=1, time_s=1.5
        ),
    ]


def stored() -> Iterator[Stored]:
    """Everything that any release has stored here."""
    for path in sorted(FOLDER.glob("*.json")):
        one = json.loads(path.read_text())
        kind = getattr(records, one["kind"])
        yield Stored(path.stem, kind, base64.b64decode(one["msgpack"]), one["said"])


def plain(record: Record) -> dict[str, Any]:
    """A record in JSON's own types, without what is not said."""
    return json.loads(msgspec.json.encode(record))  # type: ignore[no-any-return]


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for record in examples():
        value, kind = encode(record), type(record)
        path = FOLDER / f"{kind.__name__}-{records.SCHEMA}.json"
        if not path.exists():
            one = {
                "kind": kind.__name__,
                "msgpack": base64.b64encode(value).decode(),
                "said": plain(decode(kind, value)),
            }
            path.write_text(json.dumps(one, indent=1) + "\n")


def all_kinds() -> set[type[Record]]:
    """Of every topic."""
    return {topic.record for topic in topics.all_topics("policy")}


if __name__ == "__main__":
    main()
