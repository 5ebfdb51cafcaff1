import pytest

from learner.config import OptimizerConfig
from learner.schedule import learning_rate


def rates(**settings):
    config = OptimizerConfig(**{"learning_rate": 1.0, "warmup_steps": 0, "final_ratio": 0.1, **settings})
    return [learning_rate(step, config, 100) for step in range(101)]


def test_the_warm_up_rises_in_equal_parts_to_the_peak():
    assert rates(warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_falling_schedule_ends_at_its_share_of_the_peak_and_stays_there(schedule):
    falling = rates(schedule=schedule, warmup_steps=10)
    assert falling[10] == 1.0
    assert falling[55] == pytest.approx(0.55)
    assert falling[100] == pytest.approx(0.1)
    assert learning_rate(1000, OptimizerConfig(learning_rate=1.0, schedule=schedule), 100) == pytest.approx(0.1)


def test_a_constant_schedule_stays_at_the_peak():
    assert set(rates()) == {1.0}
