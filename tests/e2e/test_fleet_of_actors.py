"""A run's processes on a real Ray, whose GPUs are a number that it was told: nothing here computes."""

import threading
from collections.abc import Iterator

import pytest

from deploy.fleet import OBJECT_STORE_BYTES, Fleet
from streaming.heartbeat import NO_HISTORY
from tests.builders import make_config

pytestmark = pytest.mark.slow

HELD_S = 30.0
"""After so long the GPUs are free: a launcher that waits for them fails the test and does not hang it."""


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Timer]:
    """A Ray of two GPUs, which somebody else has reserved until the timer is over."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local", num_gpus=2, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    others = placement_group([{"GPU": 2.0}])
    assert others.wait(HELD_S)
    timer = threading.Timer(HELD_S, remove_placement_group, [others])
    timer.start()
    yield timer
    timer.cancel()
    ray.shutdown()


def test_a_learner_that_waits_for_a_gpu_keeps_the_launcher_from_nothing(held, tmp_path):
    """The launcher waited for its address, for ever and deaf to Ctrl-C."""
    fleet = Fleet(make_config(tmp_path, model=str(tmp_path / "model")), history=NO_HISTORY)
    assert held.is_alive(), "the GPUs are still reserved"
    hurry = threading.Event()
    hurry.set()
    assert "learner-0" in {ended.process.role_id for ended in fleet.stop(hurry)}
