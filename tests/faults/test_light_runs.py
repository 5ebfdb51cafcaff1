"""Every role is killed again and again, at moments that a seed decides: nothing is lost, nothing is trained twice.

Real processes and signals, on both backends; on Kafka every role is a user with exactly its rights. In between bytes
that are no record arrive, clocks jump by an hour, and two of three reward sources cannot be trusted at all.
STREAMDPO_FAULTS=long plays 50 seeds on each backend.
"""

import os

import pytest

from tests.fault_rows import Injected
from tests.light.fixtures import Play, backend, play, tiny_model
from tests.light.plan import draw

__all__ = ["backend", "play", "tiny_model"]

pytestmark = [pytest.mark.slow, pytest.mark.fault("kill")]

LONG = os.environ.get("STREAMDPO_FAULTS") == "long"
SEEDS = range(50 if LONG else 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_whose_roles_are_killed_anywhere_keeps_every_promise(seed: int, play: Play, injected: Injected) -> None:
    run, verdict = play(draw(seed))
    for kind, num in verdict.injected.items():
        injected(kind, injected=num, violations=len(verdict.violations), recovery_s=verdict.recovery_s.get(kind))
    told = "\n".join(map(str, verdict.violations))
    assert not verdict.violations, f"seed {seed} in {run.folder}:\n{told}"
