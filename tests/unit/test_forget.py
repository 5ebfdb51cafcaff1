from collections.abc import Callable
from pathlib import Path

import pytest

from actors.prompts import Prompt
from actors.scheduler import Prompts
from deploy.config import RunConfig
from deploy.forget import forget, forgotten, redacted, told, without_forgotten
from learner.limits import Limits
from streaming import topics
from streaming.blobs import BlobStore
from streaming.config import SelectionConfig
from streaming.errors import ConfigError, NotReadyError
from streaming.heartbeat import Heartbeat
from streaming.history import entries
from streaming.log.by_reference import ByReferenceLog
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import DeadLetter, Probe, Record, Source, decode, encode
from streaming.selector import select
from tests.builders import make_config, make_feedback, make_group, make_pair, make_prompt, make_scored, make_weights
from tests.fakes import Crash, CrashingLog

SECRET = "7+1="
"""The text of request 7."""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(tmp_path / "run")


def letter(number: int) -> DeadLetter:
    value = encode(make_prompt(number))
    source = Source(topic="prompts", partition=0, offset=0)
    return DeadLetter(stage="generator", source=source, key=b"k", value=value, reason="r", attempts=1, time_s=0.0)


@pytest.fixture
def filled(log: Log) -> Log:
    return fill(log)


@pytest.fixture
def large(log: Log, tmp_path: Path) -> Log:
    """The same, with values that all lie beside the log."""
    return fill(beside(log, tmp_path))


def beside(log: Log, tmp_path: Path, count: Callable[[str], None] = lambda action: None) -> Log:
    store = BlobStore(f"{tmp_path}/blobs", count=count)
    return ByReferenceLog(log, store, max_record_bytes=1, max_blob_bytes=2**20)


def fill(log: Log) -> Log:
    """Requests 7 and 8 in every topic."""
    for number in (7, 8):
        records: dict[topics.Topic, Record] = {
            topics.PROMPTS: make_prompt(number),
            topics.CANDIDATES: make_group(number=number),
            topics.SCORED: make_scored(number=number),
            topics.pairs("policy"): make_pair(number),
            topics.DEAD_LETTER: letter(number),
            topics.FEEDBACK: make_feedback(number, ending="consumed", epoch=1, step=3),
        }
        log.append(Output(topic.name, b"p%d" % number, encode(record)) for topic, record in records.items())
    return log


def files_with(text: str, folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes())


def every_value(log: Log) -> list[bytes]:
    return [entry.value for topic in topics.all_topics("policy") for entry in entries(log, topic.name)]


def test_the_prompts_text_is_nowhere_in_the_log_nor_in_its_files(
    config: RunConfig, filled: Log, tmp_path: Path
) -> None:
    assert any(SECRET.encode() in value for value in every_value(filled))
    found = forget(config, "p7", filled, tmp_path)
    assert found.deleted == dict.fromkeys(["prompts", "candidates", "scored", "pairs.policy", "dead-letter"], 1)
    assert not any(SECRET.encode() in value for value in every_value(filled))
    assert not [path for path in tmp_path.glob("log.db*") if SECRET.encode() in path.read_bytes()]


def test_other_prompts_and_the_places_of_all_records_stay(config: RunConfig, filled: Log, tmp_path: Path) -> None:
    ends = {topic.name: filled.end_offsets(topic.name) for topic in topics.all_topics("policy")}
    before = [value for value in every_value(filled) if b"8+1=" in value]
    forget(config, "p7", filled, tmp_path)
    assert [value for value in every_value(filled) if b"8+1=" in value] == before
    assert {topic.name: filled.end_offsets(topic.name) for topic in topics.all_topics("policy")} == ends


def test_what_cannot_be_deleted_is_named(config: RunConfig, filled: Log, tmp_path: Path) -> None:
    left = told(forget(config, "p7", filled, tmp_path))
    assert "it was in 1 gradient steps, the first are 3 (epoch 1)" in left
    assert "backups" in left


def test_forgetting_again_deletes_nothing_more_and_is_no_error(config: RunConfig, filled: Log, tmp_path: Path) -> None:
    forget(config, "p7", filled, tmp_path)
    assert forget(config, "p7", filled, tmp_path).deleted == {}
    assert forgotten(tmp_path) == {"p7"}


def test_forgetting_again_is_no_error_either_where_no_record_can_be_overwritten(
    config: RunConfig, filled: Log, tmp_path: Path
) -> None:
    """A log with nothing left of the prompt was taken for one on this machine: a traceback."""
    forget(config, "p7", filled, tmp_path)
    assert forget(config, "p7", CrashingLog(filled), tmp_path).deleted == {}


def test_a_prompt_that_nobody_knows_is_an_error(config: RunConfig, filled: Log, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows no prompt p99"):
        forget(config, "p99", filled, tmp_path)


def test_a_run_is_stopped_before_it_forgets(config: RunConfig, filled: Log, tmp_path: Path) -> None:
    heartbeat = Heartbeat(filled, Metrics("scorer"), role="scorer")
    with pytest.raises(NotReadyError, match="the run is running: scorer-0"):
        forget(config, "p7", filled, tmp_path)
    heartbeat.close()
    forget(config, "p7", filled, tmp_path)


def test_a_forgotten_prompt_keeps_its_place_in_the_order_and_loses_its_content() -> None:
    train = [Prompt(prompt_id=f"p{i}", text="secret", golden="secret", columns={"a": "secret"}) for i in range(3)]
    kept = without_forgotten(Prompts(train, train), {"p1"})
    assert [one.prompt_id for one in kept.train] == ["p0", "p1", "p2"]
    assert kept.train[1] == Prompt(prompt_id="p1", columns={})
    assert [one.prompt_id for one in kept.held_out] == ["p0", "p2"]


def test_what_is_left_of_a_pair_is_dropped_by_the_learner_as_forgotten() -> None:
    pair = redacted(make_pair(7))
    assert Limits(100, 100).refuse(pair) == "forgotten"  # type: ignore[arg-type]


def test_what_is_left_of_a_scored_group_makes_no_pair() -> None:
    scored = decode(type(make_scored()), encode(redacted(make_scored(number=7))))
    assert select(scored, SelectionConfig(), policy="policy").decision.route == "drop"


def test_the_blobs_of_the_prompt_are_removed_and_no_other(config: RunConfig, large: Log, tmp_path: Path) -> None:
    """They stayed until their topics' retention had passed."""
    others = files_with("8+1=", tmp_path / "blobs")
    assert len(files_with(SECRET, tmp_path / "blobs")) == len(others) == 5
    found = forget(config, "p7", large, tmp_path)
    assert found.blobs is not None and found.blobs.num_blobs == 5
    assert files_with(SECRET, tmp_path) == []
    assert files_with("8+1=", tmp_path / "blobs") == others
    assert f"deleted: 5 blobs of large records, 0.0 MB, in {tmp_path}/blobs" in told(found)
    assert len([value for value in every_value(large) if b"8+1=" in value]) == 5
    again = forget(config, "p7", large, tmp_path)
    assert (again.deleted, again.blobs) == ({}, found.blobs._replace(num_blobs=0, num_bytes=0))


def test_what_a_crash_left_of_the_blobs_is_removed_the_next_time(
    config: RunConfig, large: Log, log: Log, tmp_path: Path
) -> None:
    """Behind the rewriting of the records nothing names these blobs any more."""

    def crash(action: str) -> None:
        if action == "removed":
            raise Crash

    with pytest.raises(Crash):
        forget(config, "p7", beside(log, tmp_path, crash), tmp_path)
    assert len(files_with(SECRET, tmp_path / "blobs")) == 4
    found = forget(config, "p7", large, tmp_path)
    assert found.blobs is not None and (found.deleted, found.blobs.num_blobs) == ({}, 4)
    assert files_with(SECRET, tmp_path) == []


def test_blobs_of_the_prompt_that_no_record_names_are_removed_too(
    config: RunConfig, large: Log, tmp_path: Path
) -> None:
    """An append that failed behind the writing of its blob leaves one, and a writer that was killed half of one."""
    store = BlobStore(f"{tmp_path}/blobs/")
    for number in (7, 8):
        store.write("candidates", encode(make_group(["c", "d"], number=number)))
    (tmp_path / "blobs" / "scored" / f"{'0' * 64}.1-2.partial").write_text(SECRET)
    forget(config, "p7", large, tmp_path)
    assert files_with(SECRET, tmp_path) == []
    assert len(files_with("8+1=", tmp_path / "blobs")) == 6


def test_a_parity_probe_of_the_prompt_is_named(config: RunConfig, filled: Log, tmp_path: Path) -> None:
    probe = Probe(prompt_tokens=make_group(number=7).prompt_tokens, response_tokens=[1], logprobs=[-1.0])
    filled.append([Output("weights", b"policy/full/1", encode(make_weights(probe=probe)))])
    assert "the parity probe of a published version: its tokens" in told(forget(config, "p7", filled, tmp_path))
    assert "parity probe" not in told(forget(config, "p8", filled, tmp_path))
