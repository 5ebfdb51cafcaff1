from pathlib import Path

import pytest

from deploy.tiny_model import build_tokenizer
from streaming import topics
from streaming.errors import DataError, EngineError
from streaming.heartbeat import role_states
from streaming.log import open_log
from streaming.log.protocol import Log, Output
from streaming.records import Message, Version
from tests.builders import broken, make_prompt, tokens_of
from tests.fakes import Crash, CrashingLog
from tests.scripted_engine import Run, Script, records, running

FIRST = Version(1, 0)


@pytest.fixture
def script() -> Script:
    return Script()


def committed(log: Log) -> int:
    return sum(log.committed("generators", ["prompts"]).values())


def test_every_prompt_becomes_one_group(log: Log, tmp_path: Path, script: Script) -> None:
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.ask(*(make_prompt(i, num_candidates=3) for i in range(20)))
        groups = run.groups(20)
    assert [group.request.number for group in groups] == list(range(20))
    assert [len(group.candidates) for group in groups] == [3] * 20
    assert groups[7].prompt_tokens == tokens_of("7+1=")
    assert (groups[7].policy, groups[7].generator) == ("policy", "generator-0")
    assert groups[7].candidates[0].version == FIRST
    assert groups[7].source and groups[7].source.topic == "prompts"
    assert committed(log) == 20


def test_as_many_groups_as_allowed_are_in_flight(log: Log, tmp_path: Path, script: Script) -> None:
    prompts = [make_prompt(i) for i in range(10)]
    script.held = {prompt.text or "" for prompt in prompts}
    with running(log, tmp_path, script.make_engine, concurrency=3) as run:
        run.publish(FIRST)
        run.ask(*prompts)
        run.until(lambda: len(script.in_flight) == 3)
        run.until(lambda: run.heartbeat.state.numbers.get("in_flight") == 3)
        script.held = set()
        run.groups(10)
    assert script.most_in_flight == 3


def test_a_slow_prompt_holds_up_nobody_but_is_sampled_again_after_a_restart(
    log: Log, tmp_path: Path, script: Script
) -> None:
    prompts = [make_prompt(i, prompt_id="same partition", text=f"{i}+1=") for i in range(5)]
    script.held = {"1+1="}
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.ask(*prompts)
        assert [group.request.number for group in run.groups(4)] == [0, 2, 3, 4]
    assert committed(log) == 1
    script.held = set()
    with running(log, tmp_path, script.make_engine) as run:
        run.until(lambda: committed(log) == 5)
    assert sorted(group.request.number for group in records(log, topics.CANDIDATES)) == [0, 1, 2, 2, 3, 3, 4, 4]


def test_a_crash_between_append_and_commit_repeats_groups_under_the_same_id(
    log: Log, tmp_path: Path, script: Script
) -> None:
    with (
        pytest.raises(Crash),
        running(log, tmp_path, script.make_engine, generator_log=CrashingLog(log, after_append=1)) as run,
    ):
        run.publish(FIRST)
        run.ask(make_prompt(0))
        run.until(run.finished.is_set)
    assert committed(log) == 0
    with running(log, tmp_path, script.make_engine) as run:
        first, second = run.groups(2)
    assert first.group_id == second.group_id


def test_a_generator_waits_for_its_first_version_only(log: Log, tmp_path: Path, script: Script) -> None:
    with running(log, tmp_path, script.make_engine) as run:
        run.ask(make_prompt(0))
        run.until(lambda: run.heartbeat.state.health == "starting")
        assert not records(log, topics.CANDIDATES)
        run.publish(FIRST)
        run.groups(1)
        assert run.heartbeat.state.health == "ready"
        run.ask(make_prompt(1))
        run.groups(2)


def test_without_updates_the_initial_model_samples_for_ever(log: Log, tmp_path: Path, script: Script) -> None:
    with running(log, tmp_path, script.make_engine, update_weights=False) as run:
        run.publish(FIRST)
        run.ask(make_prompt(0, min_version=Version(1, 0)))
        (group,) = run.groups(1)
    assert group.candidates[0].version == Version(0, 0)
    assert script.started == [Version(0, 0)]


def test_a_generator_that_starts_late_starts_from_the_newest_version(log: Log, tmp_path: Path, script: Script) -> None:
    run = Run(log, None, None, tmp_path)  # type: ignore[arg-type]
    for number in range(3):
        run.publish(Version(1, number))
    with running(log, tmp_path, script.make_engine) as run:
        run.until(lambda: run.heartbeat.state.version == Version(1, 2))
        run.until(lambda: role_states(log)["generator-0"].leases == [Version(1, 2)])
    assert script.started == [Version(1, 2)]


def test_another_policys_versions_are_not_ours(log: Log, tmp_path: Path, script: Script) -> None:
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.publish(Version(9, 9), policy="other")
        run.ask(make_prompt(0))
        (group,) = run.groups(1)
    assert group.candidates[0].version == FIRST


def test_evaluation_prompts_do_not_wait_for_room(log: Log, tmp_path: Path, script: Script) -> None:
    train = [make_prompt(i) for i in range(3)]
    script.held = {"0+1=", "1+1=", "2+1="}
    evals = [make_prompt(i, purpose="eval", round=1, round_size=4) for i in range(3, 7)]
    with running(log, tmp_path, script.make_engine, concurrency=4) as run:
        run.publish(FIRST)
        run.ask(*train, *evals)
        assert [group.request.number for group in run.groups(4)] == [3, 4, 5, 6]


def test_an_evaluation_waits_for_its_version_and_updates_wait_for_an_evaluation(
    log: Log, tmp_path: Path, script: Script
) -> None:
    script.held = {"0+1="}
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(Version(1, 0))
        run.ask(make_prompt(0, purpose="eval", min_version=Version(1, 0)))
        run.until(lambda: script.in_flight == ["0+1="])
        run.publish(Version(1, 1))
        run.until(lambda: Version(1, 1) in run.heartbeat.state.leases)
        run.ask(make_prompt(1, purpose="eval", min_version=Version(1, 1)), make_prompt(2))
        assert [group.request.number for group in run.groups(1)] == [2]
        assert run.heartbeat.state.version == Version(1, 0)
        script.held = set()
        first, second, train = run.groups(3)
    assert first.candidates[0].version == train.candidates[0].version == Version(1, 0)
    assert second.candidates[0].version == Version(1, 1)


@pytest.mark.fault("weights or engine broken", backend="sqlite")
def test_an_engine_that_dies_is_replaced(log: Log, tmp_path: Path, script: Script) -> None:
    script.deadly = ["1+1=", "1+1="]
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.ask(*(make_prompt(i) for i in range(3)))
        run.groups(3)
    assert script.started == [FIRST] * 3


def test_engines_that_die_again_and_again_end_the_run(log: Log, tmp_path: Path, script: Script) -> None:
    script.deadly = ["1+1="] * 10
    with pytest.raises(EngineError, match="4 times"), running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.ask(make_prompt(1))
        run.until(run.finished.is_set)
    assert script.started == [FIRST] * 4


@pytest.mark.parametrize(("text", "reason"), [("1" * 64, "prompt_too_long"), ("", "prompt_empty")])
def test_a_prompt_that_fits_no_engine_is_dead_lettered(
    log: Log, tmp_path: Path, script: Script, text: str, reason: str
) -> None:
    request = make_prompt(3, text=text, purpose="eval", round=2, round_size=9)
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.ask(request)
        run.until(lambda: records(log, topics.FEEDBACK))
    (ending,), (letter,) = records(log, topics.FEEDBACK), records(log, topics.DEAD_LETTER)
    assert (ending.request_number, ending.ending, ending.reason) == (3, "dead_lettered", reason)
    assert (ending.round, ending.round_size) == (2, 9)
    assert letter.stage == "generator" and letter.key == b"p3"
    assert committed(log) == 1


@pytest.mark.fault("poison", backend="sqlite")
def test_bytes_that_are_no_request_are_dead_lettered_untouched(log: Log, tmp_path: Path, script: Script) -> None:
    log.append([Output("prompts", b"key", b"nonsense")])
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.ask(make_prompt(0))
        run.groups(1)
        run.until(lambda: records(log, topics.DEAD_LETTER))
    (letter,) = records(log, topics.DEAD_LETTER)
    assert (letter.key, letter.value) == (b"key", b"nonsense")
    assert committed(log) == 2


def test_a_broken_request_that_says_which_it_is_ends(log: Log, tmp_path: Path, script: Script) -> None:
    log.append([Output("prompts", b"p3", broken(make_prompt(3), num_candidates="two"))])
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.until(lambda: records(log, topics.FEEDBACK))
    (ending,), (letter,) = records(log, topics.FEEDBACK), records(log, topics.DEAD_LETTER)
    assert (ending.request_number, ending.ending, ending.reason) == (3, "dead_lettered", "record")
    assert ending.group_id == make_prompt(3).group_id
    assert "not a PromptRequest" in letter.reason
    assert committed(log) == 1


def test_a_group_too_large_for_the_log_is_dead_lettered_alone(tmp_path: Path, script: Script) -> None:
    with (
        open_log(f"sqlite:///{tmp_path}/small.db", run="test", max_record_bytes=4000, max_blob_bytes=0) as log,
        running(log, tmp_path, script.make_engine) as run,
    ):
        run.publish(FIRST)
        run.ask(make_prompt(0), make_prompt(1, num_candidates=200), make_prompt(2))
        assert [group.request.number for group in run.groups(2)] == [0, 2]
        run.until(lambda: records(log, topics.FEEDBACK))
        assert [ending.reason for ending in records(log, topics.FEEDBACK)] == ["group_too_large"]


def test_messages_for_a_model_without_a_chat_template_end_the_run_and_say_so(
    log: Log, tmp_path: Path, script: Script
) -> None:
    async def make_engine(directory: Path, version: Version) -> object:
        engine = await script.make_engine(directory, version)
        engine._tokenizer = build_tokenizer(chat_template=False)
        return engine

    with pytest.raises(DataError, match="no chat template"), running(log, tmp_path, make_engine) as run:
        run.publish(FIRST)
        run.ask(make_prompt(0, text=None, messages=[Message(role="user", content="hi")]))
        run.until(run.finished.is_set)


def test_two_generators_share_the_prompts(log: Log, tmp_path: Path, script: Script) -> None:
    with running(log, tmp_path, script.make_engine) as one, running(log, tmp_path, script.make_engine) as two:
        one.publish(FIRST)
        one.until(lambda: one.heartbeat.state.health == two.heartbeat.state.health == "ready")
        one.ask(*(make_prompt(i) for i in range(40)))
        one.groups(40)
        assert all(run.metrics.value("records_written_total", topic="candidates") > 0 for run in (one, two))


def test_time_is_busy_in_flight_and_waiting_without_work(log: Log, tmp_path: Path, script: Script) -> None:
    script.held = {"0+1="}
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.until(lambda: run.heartbeat.state.health == "ready")
        assert run.metrics.time.seconds()["busy"] == 0
        run.ask(make_prompt(0))
        run.until(lambda: run.metrics.time.seconds()["busy"] > 0.05)
        script.held = set()
        run.groups(1)
        waited = run.metrics.time.seconds()["waiting"]
        run.until(lambda: run.metrics.time.seconds()["waiting"] > waited + 0.05)


def test_a_generator_that_is_drained_finishes_what_is_in_flight_and_takes_no_more(
    log: Log, tmp_path: Path, script: Script
) -> None:
    prompts = [make_prompt(i) for i in range(6)]
    script.held = {prompt.text or "" for prompt in prompts}
    with running(log, tmp_path, script.make_engine, concurrency=2, drain_s=60) as run:
        run.publish(FIRST)
        run.ask(*prompts)
        run.until(lambda: len(script.in_flight) == 2)
        begun = set(script.in_flight)
        run.stop.set()
        run.until(lambda: run.heartbeat.state.message == "draining")
        script.held = set()
        run.until(run.finished.is_set)
    assert {group.request.text for group in records(log, topics.CANDIDATES)} == begun
    with running(log, tmp_path, script.make_engine) as run:
        run.groups(6)


def test_what_outlasts_the_grace_period_is_abandoned_and_sampled_elsewhere(
    log: Log, tmp_path: Path, script: Script
) -> None:
    script.held = {"0+1="}
    with running(log, tmp_path, script.make_engine, drain_s=0.05) as run:
        run.publish(FIRST)
        run.ask(make_prompt(0), make_prompt(1))
        run.until(lambda: script.in_flight == ["0+1="] and len(records(log, topics.CANDIDATES)) == 1)
        run.stop.set()
        run.until(run.finished.is_set)
    script.held = set()
    with running(log, tmp_path, script.make_engine) as run:
        run.groups(2)


def test_a_request_whose_prompt_was_forgotten_is_dropped_and_not_sampled(
    log: Log, tmp_path: Path, script: Script
) -> None:
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(FIRST)
        run.ask(make_prompt(0, text=None), make_prompt(1))
        run.groups(1)
        run.until(lambda: committed(log) == 2)
    [ending] = records(log, topics.FEEDBACK)
    assert (ending.request_number, ending.ending, ending.reason) == (0, "dropped", "forgotten")
    assert records(log, topics.DEAD_LETTER) == []
