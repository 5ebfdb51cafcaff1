"""Some hundred schedules of the real roles keep every promise, and a role that breaks a rule is found out."""

from dataclasses import replace

import pytest

from tests.simulation.broken import BROKEN
from tests.simulation.roles import Settings
from tests.simulation.schedule import Plan, plan, simulate, story

NUM_SEEDS = 200
"""A short form: `python -m tests.simulation --seeds 20000` is the long one."""

PER_TEST = 20


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, PER_TEST))
def test_every_promise_is_kept_under_every_schedule(first: int) -> None:
    failed = [outcome for seed in range(first, first + PER_TEST) if (outcome := simulate(seed)).violations]
    assert not failed, "\n".join(map(story, failed))


def test_a_run_without_faults_comes_to_its_end() -> None:
    outcome = simulate(1, planned=Plan(Settings(num_requests=12, num_held_out=2), {}))
    assert not outcome.violations, story(outcome)
    assert not outcome.faults


@pytest.mark.parametrize("seed", [126, 366, 397, 438])
def test_however_often_roles_stand_still_and_have_heirs_every_promise_is_kept(seed: int) -> None:
    """Two requests had one number, where the scheduler stood still between its look for an heir and an append."""
    often = {**plan(seed).rates, "zombie": 0.02}
    outcome = simulate(seed, planned=replace(plan(seed), rates=often))
    assert outcome.faults["zombie"] > 10
    assert not outcome.violations, story(outcome)


@pytest.mark.parametrize("seed", [2, 17])
def test_a_seed_gives_the_same_run_every_time(seed: int) -> None:
    once, again = simulate(seed, is_traced=True), simulate(seed, is_traced=True)
    assert once.trace == again.trace
    assert (once.fingerprint, once.num_steps) == (again.fingerprint, again.num_steps)


def test_the_plans_have_every_kind_of_fault_and_of_role() -> None:
    plans = [plan(seed) for seed in range(NUM_SEEDS)]
    assert len({kind for one in plans for kind in one.rates}) == 20
    assert {one.settings.num_generators for one in plans} == {1, 2}
    assert {one.settings.batch_size for one in plans} == {1, 2, 3}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found_within_a_few_seeds(rule: str) -> None:
    cast, invariant = BROKEN[rule]
    found: set[str] = set()
    for seed in range(60):
        found |= {violation.invariant for violation in simulate(seed, cast=cast).violations}
        if invariant in found:
            return
    pytest.fail(f"a role that {rule} breaks {found or 'nothing'}")
