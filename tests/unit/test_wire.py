"""Rolling upgrades: releases that read each other's records."""

import msgspec
import pytest

from streaming import topics
from streaming.config import SelectionConfig
from streaming.errors import RecordError
from streaming.heartbeat import Heartbeat
from streaming.history import entries
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import DeadLetter, Feedback, Record, ScoredGroup, decode, encode
from streaming.selector import Selector
from streaming.wire import SCHEMA
from tests.builders import make_feedback, make_scored
from tests.stored_records import Stored, all_kinds, plain, stored

STORED = list(stored())


@pytest.mark.parametrize("one", STORED, ids=[one.name for one in STORED])
def test_what_any_release_has_stored_says_what_it_said_then(one: Stored) -> None:
    now = plain(decode(one.kind, one.value))
    assert {name: now.get(name) for name in one.said} == one.said
    assert getattr(decode(one.kind, one.value), "schema", None) == int(one.name.rpartition("-")[2])


def test_every_record_that_travels_is_stored() -> None:
    assert {one.kind for one in STORED if one.name.endswith(f"-{SCHEMA}")} == all_kinds()


def changed(record: Record, **fields: object) -> bytes:
    """As a newer release would write it."""
    return msgspec.msgpack.encode(msgspec.msgpack.decode(encode(record)) | fields)


def test_fields_of_a_newer_release_are_ignored() -> None:
    assert decode(Feedback, changed(make_feedback(1), colour="blue", depth={"a": [1]})) == make_feedback(1)


@pytest.mark.parametrize("fields", [{}, {"request_number": "a text now"}], ids=["readable", "of another layout"])
def test_a_newer_schema_is_refused_by_its_number_whether_or_not_it_could_be_read(fields: dict[str, object]) -> None:
    with pytest.raises(RecordError, match=rf"a Feedback of schema {SCHEMA + 1}: this release reads up to {SCHEMA}"):
        decode(Feedback, changed(make_feedback(1), schema=SCHEMA + 1, **fields))


def test_a_record_of_a_newer_schema_is_a_dead_letter_that_says_so_and_its_request_ends(log: Log) -> None:
    metrics = Metrics("selector")
    heartbeat = Heartbeat(log, metrics, role="selector")
    log.append([Output(topics.SCORED.name, b"g", changed(make_scored(number=4), schema=SCHEMA + 1))])
    stage = Selector(log, metrics, heartbeat, config=SelectionConfig(), policy="policy").stage()
    with log.subscribe(topics.selectors("policy"), [topics.SCORED.name]) as consumer:
        stage.run_once(consumer, timeout_s=0)
    heartbeat.close()
    [letter] = [decode(DeadLetter, entry.value) for entry in entries(log, topics.DEAD_LETTER.name)]
    assert f"a ScoredGroup of schema {SCHEMA + 1}" in letter.reason
    assert decode(ScoredGroup, changed(make_scored(number=4))).group.request.number == 4
    [ending] = [decode(Feedback, entry.value) for entry in entries(log, topics.FEEDBACK.name)]
    assert (ending.request_number, ending.ending) == (4, "dead_lettered")
