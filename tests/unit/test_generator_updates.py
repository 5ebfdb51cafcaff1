"""A generator between two weight versions: which are applied, and what is written of what they sampled."""

import threading
from pathlib import Path

import msgspec
import pytest

from streaming.errors import WeightsError
from streaming.log.protocol import Log
from streaming.records import Version
from tests.builders import make_prompt
from tests.fakes import CrashingLog
from tests.scripted_engine import PATIENCE_S, PROBE, WRONG_LOGPROB, Script, running


@pytest.fixture
def script() -> Script:
    return Script()


def committed(log: Log) -> int:
    return sum(log.committed("generators", ["prompts"]).values())


def test_updates_follow_epoch_and_number(log: Log, tmp_path: Path, script: Script) -> None:
    """A restarted learner's lower number is newer; an older epoch's version that comes late is not applied."""
    with running(log, tmp_path, script.make_engine) as run:
        for version in (Version(1, 0), Version(1, 7), Version(2, 3), Version(2, 4)):
            run.publish(version)
            run.until(lambda version=version: run.heartbeat.state.version == version)
        run.publish(Version(1, 8))
        run.ask(make_prompt(0))
        (group,) = run.groups(1)
        assert group.candidates[0].version == Version(2, 4)
        run.until(lambda: run.metrics.value("weight_updates_total", outcome="applied") == 3)
        assert (run.metrics.value("weights_epoch"), run.metrics.value("weights_number")) == (2, 4)
        assert run.metrics.value("parity_max_abs_difference") == 0
    assert script.started == [Version(1, 0)]


@pytest.mark.fault("weights or engine broken", backend="sqlite")
def test_a_version_with_wrong_bytes_is_refused_and_sampling_goes_on(log: Log, tmp_path: Path, script: Script) -> None:
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(Version(1, 0))
        run.until(lambda: run.heartbeat.state.health == "ready")
        run.publish(Version(2, 0), manifest_sha256="0" * 64)
        run.publish(Version(2, 1), location=str(tmp_path / "1.0"))
        run.publish(Version(2, 2), location=str(tmp_path / "pruned"))
        run.until(lambda: run.metrics.value("weight_updates_total", outcome="refused") >= 1)
        run.ask(make_prompt(0))
        run.groups(1)
        assert run.heartbeat.state.health == "degraded"
        run.publish(Version(2, 3))
        run.until(lambda: run.heartbeat.state.version == Version(2, 3))
        assert run.heartbeat.state.health == "ready"
    assert script.started == [Version(1, 0)]


@pytest.mark.fault("weights or engine broken", backend="sqlite")
def test_after_a_failed_load_a_new_engine_samples_what_was_in_flight(log: Log, tmp_path: Path, script: Script) -> None:
    script.torn = {Version(1, 1)}
    script.held = {"0+1="}
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(Version(1, 0))
        run.ask(make_prompt(0))
        run.until(lambda: script.in_flight)
        run.publish(Version(1, 1))
        run.until(lambda: run.heartbeat.state.version == Version(1, 1))
        script.held = set()
        (group,) = run.groups(1)
        assert run.metrics.value("weight_updates_total", outcome="failed") == 1
    assert group.candidates[0].version == Version(1, 1)
    assert (script.started, script.closed) == ([Version(1, 0), Version(1, 1)], 2)


@pytest.mark.fault("weights or engine broken", backend="sqlite")
def test_a_version_that_no_engine_loads_leaves_the_generator_on_the_one_before(
    log: Log, tmp_path: Path, script: Script
) -> None:
    script.torn = script.unusable = {Version(1, 1)}
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(Version(1, 0))
        run.until(lambda: run.heartbeat.state.health == "ready")
        run.publish(Version(1, 1))
        run.until(lambda: run.metrics.value("weight_updates_total", outcome="failed") == 1)
        run.ask(make_prompt(0))
        (group,) = run.groups(1)
        assert group.candidates[0].version == Version(1, 0)
        run.publish(Version(1, 2))
        run.until(lambda: run.heartbeat.state.version == Version(1, 2))
    assert script.started == [Version(1, 0)] * 2


@pytest.mark.fault("weights or engine broken", backend="sqlite")
def test_what_was_sampled_before_the_parity_probe_failed_is_not_written(
    log: Log, tmp_path: Path, script: Script
) -> None:
    script.misplaced = {Version(1, 1)}
    with running(log, tmp_path, script.make_engine) as run:
        run.publish(Version(1, 0))
        run.until(lambda: run.heartbeat.state.health == "ready")
        run.publish(Version(1, 1))
        for i in range(20):
            run.ask(make_prompt(i))
        run.until(lambda: run.metrics.value("weight_updates_total", outcome="parity") == 1)
        assert run.metrics.value("parity_max_abs_difference") == 0  # that of the new engine
        groups = run.groups(20)
    assert WRONG_LOGPROB not in {lp for group in groups for c in group.candidates for lp in c.logprobs}
    assert script.started == [Version(1, 0), Version(1, 1)]


class HeldLog(CrashingLog):
    """Commits wait while `may_commit` is clear."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.may_commit = threading.Event()
        self.may_commit.set()
        self.is_waiting = False

    def pass_by(self, place: str) -> None:
        if place == "before commit":
            self.is_waiting = not self.may_commit.is_set()
            assert self.may_commit.wait(PATIENCE_S)


def test_an_update_that_begins_while_a_write_asks_for_its_prompts_holds_the_write_up(
    log: Log, tmp_path: Path, script: Script
) -> None:
    """What the new version sampled meanwhile used to be written with the rest, before its parity was known."""
    script.misplaced = {Version(1, 1)}
    script.held = {"1+1=", "2+1="}
    held = HeldLog(log)
    with running(log, tmp_path, script.make_engine, generator_log=held, away_s=0) as run:
        run.publish(Version(1, 0))
        run.ask(make_prompt(0))
        run.until(lambda: committed(log) == 1)
        run.ask(make_prompt(1), make_prompt(2))
        run.until(lambda: len(script.in_flight) == 2)
        held.may_commit.clear()
        script.held = {"2+1="}
        run.until(lambda: held.is_waiting)
        script.may_start.clear()
        run.publish(Version(1, 1))
        run.until(lambda: script.loaded == [Version(1, 1)])
        script.held = set()
        run.until(lambda: script.closed == 1)  # for parity: the probe waits until something is sampled
        run.ask(make_prompt(3))
        held.may_commit.set()
        run.until(lambda: run.metrics.value("records_read_total", topic="prompts") == 4)  # after the commit
        script.may_start.set()
        groups = run.groups(4)
    assert WRONG_LOGPROB not in {lp for group in groups for c in group.candidates for lp in c.logprobs}
    assert [group.candidates[0].version.number for group in groups] == [0, 0, 1, 1]


def test_a_fresh_engine_that_differs_from_the_learner_ends_the_run(log: Log, tmp_path: Path, script: Script) -> None:
    wrong = msgspec.structs.replace(PROBE, logprobs=[-1.0, -1.1])
    with pytest.raises(WeightsError, match="differ"), running(log, tmp_path, script.make_engine) as run:
        run.publish(Version(1, 0), probe=wrong)
        run.until(run.finished.is_set)
    assert script.closed == len(script.started)


@pytest.mark.fault("weights or engine broken", backend="sqlite")
def test_an_engine_that_died_is_replaced_from_the_newest_version_whose_bytes_are_still_right(
    log: Log, tmp_path: Path, script: Script
) -> None:
    script.deadly = ["1+1="]
    with running(log, tmp_path, script.make_engine) as run:
        for version in (Version(1, 0), Version(1, 1)):
            run.publish(version)
            run.until(lambda version=version: run.heartbeat.state.version == version)
        (tmp_path / "1.1" / "model").write_text("torn")
        run.ask(make_prompt(1))
        (group,) = run.groups(1)
    assert group.candidates[0].version == Version(1, 0)
    assert script.started == [Version(1, 0)] * 2
