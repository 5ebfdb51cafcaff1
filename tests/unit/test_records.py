"""Records on the wire: ids that never change, layouts that grow, bytes that are no record."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streaming import topics
from streaming.errors import ConfigError, RecordError, StreamDPOError
from streaming.records import (
    SCHEMA,
    Group,
    Pair,
    PromptRequest,
    Record,
    Sampling,
    Source,
    Span,
    Version,
    decode,
    encode,
    stable_id,
)
from tests.builders import (
    make_candidate,
    make_feedback,
    make_group,
    make_pair,
    make_prompt,
    make_response,
    make_role,
    make_scored,
    make_weights,
)

SAMPLES = [
    make_prompt(1, min_version=Version(2, 3), columns={"answer": [1, "two", None]}),
    make_group(source=Source(topic="prompts", partition=0, offset=1)),
    make_scored([1.0, None]),
    make_pair(),
    make_pair(rejected=None),
    make_feedback(ending="evaluated", version=Version(1, 2)),
    make_weights(lineage=[Version(1, 9)]),
    make_role(leases=[Version(1, 0)]),
]


@pytest.mark.parametrize("record", SAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was_written(record: Record) -> None:
    assert decode(type(record), encode(record)) == record


def test_ids_are_the_same_in_every_process_and_release() -> None:
    """Written down: a change here orphans every id in every log."""
    assert stable_id("group", 3, "p3") == make_prompt(3).group_id == "b02dc9a29ba53957"
    code = "from tests.builders import make_pair; print(make_pair(5).pair_id)"
    command, root = [sys.executable, "-c", code], Path(__file__).resolve().parent.parent.parent
    other = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    assert other == make_pair(5).pair_id


def test_ids_keep_types_apart() -> None:
    assert stable_id(1) != stable_id("1")
    assert stable_id("a", "b") != stable_id("ab")


@pytest.mark.parametrize("change", [{"number": 1}, {"prompt_id": "q"}])
def test_a_group_id_depends_on_the_request_and_its_prompt(change: dict[str, Any]) -> None:
    assert make_prompt(**change).group_id != make_prompt().group_id


def test_a_group_id_does_not_depend_on_what_was_sampled() -> None:
    assert make_group(["a", "b"]).group_id == make_group(["c", "d"]).group_id


@pytest.mark.parametrize("texts", [["a", "c"], ["b", "a"], ["a"], ["a", "b", "b"]])
def test_a_content_hash_tells_two_samplings_apart(texts: list[str]) -> None:
    assert make_group(texts).content_hash != make_group(["a", "b"]).content_hash


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "other"},
        {"group_id": "other"},
        {"settings_hash": "other"},
        {"index": 1},
        {"chosen": make_response(candidate=2)},
        {"rejected": make_response(candidate=2)},
        {"rejected": None},
    ],
    ids=str,
)
def test_a_pair_id_depends_on_everything_that_made_the_pair(change: dict[str, Any]) -> None:
    fields = {"chosen": make_response(candidate=0), "rejected": make_response(candidate=1)}
    before = msgspec.structs.replace(make_pair(), **fields)
    assert msgspec.structs.replace(before, **change).pair_id != before.pair_id


def test_a_restarted_learners_lower_number_is_the_newer_version() -> None:
    assert Version(1, 9) < Version(2, 3) < Version(2, 4)


def test_a_candidate_across_an_update_has_no_single_version() -> None:
    spans = [Span(version=Version(1, 4), start=0, end=1), Span(version=Version(1, 5), start=1, end=2)]
    assert make_candidate().version == Version(1, 0)
    assert make_candidate(spans=spans).version is None


def test_fields_of_a_newer_release_are_ignored() -> None:
    newer = msgspec.to_builtins(make_prompt()) | {"invented_later": {"a": [1]}}
    assert decode(PromptRequest, msgspec.msgpack.encode(newer)) == make_prompt()


def test_a_record_of_an_older_release_gets_defaults() -> None:
    oldest = {"number": 3, "prompt_id": "p3", "num_candidates": 2, "text": "hi"}
    read = decode(PromptRequest, msgspec.msgpack.encode(oldest))
    assert (read.sampling, read.purpose, read.schema) == (Sampling(), "train", SCHEMA)


@pytest.mark.parametrize(
    "value",
    [b"", b"not msgpack", b"\xc1", encode(make_pair())[:-1], encode(make_prompt()), msgspec.msgpack.encode(["a"])],
    ids=["empty", "text", "never used", "torn", "another kind", "a list"],
)
def test_bytes_that_are_no_record_are_an_error_that_says_where(value: bytes) -> None:
    with pytest.raises(RecordError, match="prompts/0@7: not a Pair"):
        decode(Pair, value, where="prompts/0@7")


def test_a_field_of_the_wrong_type_is_named() -> None:
    wrong = msgspec.to_builtins(make_group()) | {"prompt_tokens": "abc"}
    with pytest.raises(RecordError, match="prompt_tokens"):
        decode(Group, msgspec.msgpack.encode(wrong))


def test_records_do_not_change() -> None:
    with pytest.raises(AttributeError):
        make_pair().weight = 2.0  # type: ignore[misc]


def test_every_topic_is_found_by_its_name_and_no_other() -> None:
    assert all(topics.find(topic.name) == topic for topic in topics.all_topics("a.b"))
    assert topics.find("pair") is None
    assert topics.find("prompts2") is None


def test_an_error_says_where_and_what_to_do_even_after_a_journey_between_processes() -> None:
    error = ConfigError("wrong", where="a.b", do="Mend it.")
    rebuild, arguments = error.__reduce__()
    assert str(rebuild(*arguments)) == str(error) == "a.b: wrong\n  Mend it."
    assert type(rebuild(*arguments)) is ConfigError
    assert isinstance(error, StreamDPOError) and error.exit_code == 2
