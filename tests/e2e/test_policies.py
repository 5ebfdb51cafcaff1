"""Two policies over one stream of candidates: one samples and sets the pace, the other learns beside it."""

import os
import signal

import pytest

from deploy.config import load_run
from deploy.roles import open_run_log
from deploy.tiny_model import save_tiny_model
from streaming import topics
from streaming.audit import audit_log
from streaming.history import entries
from streaming.records import RoleState, ScoredGroup, decode
from tests.e2e.test_run import RUN_S, SETTINGS, feedback, started, state, until, write_run

pytestmark = pytest.mark.slow

NUM_STEPS = 5
"""Steps of the first policy while the second stands still: far more than it has batches under way."""


def steps(states: RoleState | None) -> float:
    return states.numbers.get("step", 0) if states is not None else 0


def test_a_second_policy_is_killed_and_resumed_without_holding_up_the_first_and_both_books_balance(tmp_path):
    own = {"optimizer": {"learning_rate": 3.0e-4}, "batch": {"batch_size": 6, "max_staleness": 64}}
    path = write_run(
        tmp_path,
        policies={"b": {"model": "second", "selection": {"min_margin": 0.05}, "learner": own}},
        scheduler={**SETTINGS["scheduler"], "max_requests": 150},
    )
    save_tiny_model(tmp_path / "second", seed=7)
    directory = tmp_path / "runs" / "mine"
    with started(path) as process:
        until(lambda: steps(state(directory, "learner.b-0")) >= 2, process)
        second = state(directory, "learner.b-0")
        assert second is not None
        os.kill(second.pid, signal.SIGSTOP)
        before = steps(state(directory, "learner-0"))
        until(lambda: steps(state(directory, "learner-0")) >= before + NUM_STEPS, process)
        os.kill(second.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, err
    assert "learner.b-0 failed" in out
    assert "end of data" in out

    with open_run_log(load_run(directory)) as log:
        books = {policy: audit_log(log, policy=policy) for policy in ("policy", "b")}
        groups = [decode(ScoredGroup, entry.value) for entry in entries(log, topics.SCORED.name)]
    assert all(balance.is_balanced for balance in books.values()), books
    assert books["b"].count("trained") > 0
    assert books["b"].num_requests == books["policy"].num_requests
    priced = [(group.priced_for("policy"), group.priced_for("b")) for group in groups]
    assert all(one and other and one.version != other.version for one, other in priced), "each by its own reference"

    taken = [one for one in feedback(directory) if one.policy == "b" and one.ending == "consumed" and not one.reason]
    assert {one.epoch for one in taken} == {1, 2}, "it went on after the kill"
    assert {one.sampled_by for one in taken} == {"policy"}
    assert all(one.staleness is not None for one in taken)
    last = state(directory, "learner.b-0")
    assert last is not None and (last.health, last.message) == ("stopped", "end of data")
    assert (directory / "last.b" / "manifest.json").exists()
    assert (directory / "last" / "manifest.json").exists()
