"""Generator, scorer and selector stand still, others take their work over, and they wake in the middle of it.

They stop themselves (SIGSTOP) at an exact moment, for longer than a lease and than they may be silent. They claim no
epoch: what they write late is either not written at all, or a copy under the same id, which nobody follows.
"""

import itertools
import os

import pytest

from tests.fault_rows import Injected
from tests.light.fates import APPEND, APPENDED, COMMIT, READ, Fate
from tests.light.fixtures import Play, backend, play, tiny_model
from tests.light.plan import Plan
from tests.light.verdict import num_late_copies

__all__ = ["backend", "play", "tiny_model"]

pytestmark = [pytest.mark.slow, pytest.mark.fault("freeze")]

LONG = os.environ.get("STREAMDPO_FAULTS") == "long"

ROLES = ("generator", "scorer", "selector")

MOMENTS = [(READ, APPEND), (APPENDED, COMMIT)] if LONG else [(READ, APPEND)]
"""Each role's first start freezes at the one, its second one at the other."""


@pytest.mark.parametrize("moments", MOMENTS)
def test_what_a_member_does_late_changes_nothing(
    moments: tuple[str, str], backend: str, play: Play, injected: Injected
) -> None:
    if backend == "kafka" and not LONG:
        pytest.skip("the same on Kafka: set STREAMDPO_FAULTS=long")
    fates = {f"{role}-0": tuple(Fate("freeze", 1, moment) for moment in moments) for role in ROLES}
    run, verdict = play(Plan(seed=0, dooms=fates))
    for kind, num in verdict.injected.items():
        injected(kind, injected=num, violations=len(verdict.violations), recovery_s=verdict.recovery_s.get(kind))
    assert not verdict.violations, f"in {run.folder}:\n" + "\n".join(map(str, verdict.violations))
    num_late = num_late_copies(run)
    assert set(num_late) == set(itertools.product(ROLES, moments))
    for (role, moment), num in num_late.items():
        is_written = moment == APPEND  # between its look and its act, and somebody has done the same long ago
        if role == "generator":  # that one may take up later what others have begun, as every member of a group may
            assert num >= is_written, moment
        else:
            assert num == is_written, (role, moment)
