from pathlib import Path
from typing import Any

import pytest

from deploy.config import RunConfig, run_directory
from deploy.fleet import Ended
from deploy.live import Progress
from deploy.roles import Process
from deploy.watch import Watch
from streaming.errors import ConfigError
from streaming.log.protocol import Log, Output
from streaming.records import Version, encode
from tests.builders import make_config, make_feedback, make_role, make_weights


class Told:
    """A view that remembers."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def update(self, progress: Progress) -> None:
        pass

    def event(self, text: str) -> None:
        self.events.append(text)


def config(folder: Path, **changed: Any) -> RunConfig:
    return make_config(folder, policies={"b": {}}, **changed)


def watch(log: Log, folder: Path, **changed: Any) -> tuple[Watch, Told]:
    told = Told()
    return Watch(config(folder, **changed), log, told), told


def beat(log: Log, role: str, message: str) -> None:
    state = make_role(role, health="stopped", message=message)
    log.append([Output("roles", state.role_id.encode(), encode(state))])


def done(role: str) -> Ended:
    return Ended(Process(role, 0), None, None)


def failed(role: str, *, again_s: float | None = None) -> Ended:
    return Ended(Process(role, 0), ConfigError("diverged", where=role, do="Mend it."), again_s)


def test_at_the_end_of_the_data_the_run_waits_for_a_policy_that_still_learns_from_it(log: Log, tmp_path: Path) -> None:
    beat(log, "scheduler", "end of data")
    beat(log, "learner.b", "end of data")
    watched, _ = watch(log, tmp_path)
    assert watched.ended(done("scheduler")) is None
    assert watched.ended(done("learner.b")) == "end of data"


def test_a_policy_that_is_through_before_is_not_waited_for(log: Log, tmp_path: Path) -> None:
    beat(log, "scheduler", "end of data")
    watched, _ = watch(log, tmp_path)
    assert watched.ended(done("learner.b")) is None
    assert watched.ended(done("scheduler")) == "end of data"


def test_a_learner_at_its_last_step_waits_for_no_other(log: Log, tmp_path: Path) -> None:
    beat(log, "scheduler", "learner stopped")
    beat(log, "learner", "max_steps")
    watched, _ = watch(log, tmp_path, learner={"max_steps": 3})
    assert watched.ended(done("scheduler")) == "the learner has taken its 3 steps"


def test_a_further_policy_that_cannot_go_on_ends_no_run_and_is_told_of(log: Log, tmp_path: Path) -> None:
    beat(log, "scheduler", "end of data")
    watched, told = watch(log, tmp_path)
    assert watched.ended(failed("learner.b", again_s=1.0)) is None
    assert watched.broken == []
    assert watched.ended(failed("learner.b")) is None
    assert [error.what for error in watched.broken] == ["diverged"]
    assert "learner.b-0 cannot go on, the other policies do" in told.events[-1]
    assert watched.ended(done("scheduler")) == "end of data", "nobody waits for it any more"


def test_a_role_of_the_runs_own_policy_that_cannot_go_on_ends_the_run(log: Log, tmp_path: Path) -> None:
    watched, _ = watch(log, tmp_path)
    with pytest.raises(ConfigError, match="diverged"):
        watched.ended(failed("learner"))


def test_the_last_version_of_every_policy_is_kept(log: Log, tmp_path: Path) -> None:
    settings = config(tmp_path)
    for policy, version in (("policy", Version(1, 4)), ("b", Version(2, 9))):
        place = run_directory(settings) / "weights" / policy / str(version)
        place.mkdir(parents=True)
        (place / "config.json").write_text(policy)
        weights = make_weights(version, policy=policy, location=str(place))
        log.append([Output("weights", f"{policy}/full".encode(), encode(weights))])
    watched, _ = watch(log, tmp_path)
    watched.keep_last()
    kept = {name: (tmp_path / name / "config.json").read_text() for name in ("last", "last.b")}
    assert kept == {"last": "policy", "last.b": "b"}


def evaluate(log: Log, *rewards: float) -> None:
    """One round each of one prompt, under one version after the other."""
    for round, reward in enumerate(rewards):
        one = make_feedback(
            round, ending="evaluated", round=round, round_size=1, mean_reward=reward, version=Version(1, round)
        )
        log.append([Output("feedback", b"k", encode(one))])


def test_every_measurement_of_this_start_is_told_once_and_the_best_is_known(log: Log, tmp_path: Path) -> None:
    watched, told = watch(log, tmp_path)
    evaluate(log, 0.25, 0.75, 0.5)
    watched.look(0.0)
    watched.look(1.0)
    assert [event for event in told.events if "held-out" in event] == [
        f"held-out reward {reward} (version 1.{number}, 1 prompts)"
        for number, reward in enumerate(("0.250", "0.750", "0.500"))
    ]
    assert watched.best is not None and watched.best.version == Version(1, 1)
    assert watched.newest is not None and watched.newest.version == Version(1, 2)


def test_a_best_version_that_is_gone_is_told_of_once(log: Log, tmp_path: Path) -> None:
    """It was told again with every answer of every later round."""
    watched, told = watch(log, tmp_path)
    evaluate(log, 0.75)
    watched.look(0.0)
    evaluate(log, 0.75, 0.5)
    watched.look(1.0)
    assert [event for event in told.events if "no longer" in event] == [
        "version 1.0 is no longer on disk: best stays as it is"
    ]


def test_missing_rewards_are_counted_once_however_many_policies_learn(log: Log, tmp_path: Path) -> None:
    for number in range(20):
        for policy, reason in (("policy", "" if number % 2 else "tie"), ("b", "reward_missing")):
            one = make_feedback(number, ending="dropped", policy=policy, reason=reason, time_s=1.0, stage="selector")
            log.append([Output("feedback", b"k", encode(one))])
    watched, told = watch(log, tmp_path)
    watched.look(0.0)
    assert told.events == []
