"""A learner that another policy feeds, alone over a recorded log: how old its pairs are, and when it is over."""

import time

import pytest

from deploy.tiny_model import save_tiny_model
from streaming import topics
from streaming.heartbeat import role_states
from streaming.log.protocol import Output
from streaming.records import Version, encode
from tests.builders import make_pair, make_role, make_scored, make_weights
from tests.learner_process import PATIENCE_S, SETTINGS, feedback, logs, open_run, record, start, wait

pytestmark = pytest.mark.slow

RECENT = Version(1, 18)
NEWEST = Version(1, 20)
WITHOUT_END = {name: value for name, value in SETTINGS.items() if name != "max_steps"}

LOOKS_S = 3.0
"""In this time a waiting learner looks at least twice whether the data are over."""


def sampled(number, version=RECENT):
    return make_pair(number, sampled_by="other", version=version)


@pytest.fixture
def run(tmp_path):
    """At the end of the data: the policy that samples has learned from everything, one group is to be selected."""
    numbers = {"exhausted": 1.0, "outstanding": 0.0}
    scheduler = make_role("scheduler", time_s=time.time(), numbers=numbers)
    with open_run(tmp_path) as log:
        log.append(
            [
                Output(topics.WEIGHTS.name, b"other/full", encode(make_weights(NEWEST, policy="other"))),
                Output(topics.ROLES.name, b"scheduler-0", encode(scheduler)),
                Output(topics.SCORED.name, b"group", encode(make_scored())),
            ]
        )
    record(tmp_path, *(sampled(number) for number in range(7)), sampled(7, Version(1, 0)))
    return tmp_path


@pytest.fixture
def learner(run):
    """The learner's process; killed where the test ends before it."""
    process = start(run, save_tiny_model(run / "model"), WITHOUT_END, sampled_by="other")
    yield process
    process.kill()
    process.join()


def consumed(run):
    return [one for one in feedback(run, "consumed") if not one.reason]


def test_it_waits_for_its_selectors_and_then_trains_what_is_left(run, learner):
    limit_s = time.monotonic() + PATIENCE_S
    while len(consumed(run)) < 5:
        assert learner.is_alive() and time.monotonic() < limit_s, logs(run)
        learner.join(0.05)
    learner.join(LOOKS_S)
    assert learner.is_alive(), "its selectors have not settled every scored group"
    assert len(consumed(run)) == 5, "no partial batch before the end"

    record(run, sampled(8), sampled(9))
    with open_run(run) as log, log.subscribe(topics.selectors("policy"), [topics.SCORED.name]) as selector:
        selector.read(max_records=9, timeout_s=1.0)
        selector.commit(selector.positions())
    assert wait(learner) == 0, logs(run)
    with open_run(run) as log:
        assert role_states(log)["learner-0"].message == "end of data"
    assert sorted(one.request_number for one in consumed(run)) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert {(one.sampled_by, one.staleness) for one in consumed(run)} == {("other", 2)}
    assert [(one.request_number, one.reason) for one in feedback(run, "dropped")] == [(7, "stale")]
