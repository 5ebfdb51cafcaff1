"""The model of a run: nothing is lost in it, staleness stays bounded, and it says what a real run says."""

import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming import topics
from streaming.log.protocol import Log
from streaming.records import Feedback, decode
from tests.bench import simulated
from tests.bench.pipeline import Costs, Pipeline, Plan, Ran

FREE = Costs(schedule_s=0.0, score_s=0.0, select_s=0.0, lead_s=0.0, broker_s=0.0, hop_s=0.0)
PLAN = Plan(
    num_generators=3,
    concurrency=2,
    sampling_s=1.0,
    num_requests=400,
    pipeline_depth=24,
    batch_size=4,
    step_s=0.1,
    drop_share=0.2,
)


def ran(plan: Plan, costs: Costs = FREE, *, seed: int = 0) -> Ran:
    return Pipeline(plan, costs, seed=seed).run()


SECONDS = st.floats(0.0, 10.0)
PLANS = st.builds(
    PLAN._replace,
    num_generators=st.integers(1, 5),
    concurrency=st.integers(1, 3),
    sampling_s=st.floats(0.001, 10.0),
    num_requests=st.integers(10, 80),
    pipeline_depth=st.integers(9, 40),
    batch_size=st.integers(1, 8),
    step_s=SECONDS,
    sync_every=st.integers(1, 3),
    publish_s=SECONDS,
    apply_s=SECONDS,
    max_staleness=st.integers(0, 4),
    drop_share=st.floats(0.0, 1.0),
    num_scorers=st.integers(1, 3),
    slow_generators=st.integers(0, 2),
    slowness=st.floats(1.0, 1000.0),
)
COSTS = st.builds(Costs, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS, SECONDS)


@given(plan=PLANS, costs=COSTS)
def test_whatever_it_costs_every_request_ends_once_and_none_is_too_far_ahead_or_too_old(plan: Plan, costs: Costs):
    found = ran(plan, costs)
    assert found.endings.total() == plan.num_requests
    assert found.endings["trained"] == found.ages.total()
    assert found.most_outstanding <= plan.pipeline_depth
    assert max(found.ages, default=0) <= plan.max_staleness
    assert all(share <= 1.000001 for share in found.use.values())


@given(costs=COSTS, depth=st.integers(5, 60), sync_every=st.integers(1, 3), step_s=SECONDS)
def test_pacing_alone_bounds_staleness_where_no_group_overtakes_another(
    costs: Costs, depth: int, sync_every: int, step_s: float
):
    """All that was ahead of a group when it was issued, and what came in the step under way."""
    plan = PLAN._replace(
        num_generators=1, concurrency=1, drop_share=0.0, pipeline_depth=depth, sync_every=sync_every, step_s=step_s,
        max_staleness=10**6, num_requests=200,
    )  # fmt: skip
    bound = -(-depth // (plan.batch_size * sync_every)) + 1
    found = ran(plan, costs)
    assert max(found.ages) <= bound
    assert found.endings == Counter(trained=200)


def test_a_generator_that_others_overtake_is_what_max_staleness_is_for() -> None:
    plan = PLAN._replace(slow_generators=1, slowness=100.0, max_staleness=8)
    found = ran(plan)
    assert found.endings["stale"] > 0
    assert max(found.ages) <= 8
    assert ran(plan._replace(max_staleness=10**6)).endings["stale"] == 0


def test_the_same_seed_gives_the_same_run_and_another_one_another() -> None:
    costs = Costs(0.01, 0.02, 0.01, 0.01, 0.01, 0.01)
    assert ran(PLAN, costs, seed=3) == ran(PLAN, costs, seed=3)
    assert ran(PLAN, costs, seed=3) != ran(PLAN, costs, seed=4)


@pytest.mark.parametrize(
    ("station", "costs"),
    [
        ("scheduler", FREE._replace(schedule_s=0.5)),
        ("brokers", FREE._replace(broker_s=0.5)),
        ("scorers", FREE._replace(score_s=0.5)),
        ("selectors", FREE._replace(select_s=0.5)),
        ("learner", FREE._replace(lead_s=0.625)),
    ],
)
def test_the_dearest_station_sets_the_pace_and_is_named(station: str, costs: Costs) -> None:
    found = ran(PLAN._replace(num_requests=2000, concurrency=8, step_s=0.0), costs)
    assert found.bottleneck == station
    assert found.groups_per_s == pytest.approx(2.0, rel=0.1)


def test_two_of_a_station_do_twice_as_much() -> None:
    plan = PLAN._replace(num_generators=4, concurrency=8, num_requests=2000, pipeline_depth=64, step_s=0.0)
    costs = FREE._replace(score_s=0.5)
    pace = ran(plan._replace(num_scorers=2), costs).groups_per_s / ran(plan, costs).groups_per_s
    assert pace == pytest.approx(2.0, rel=0.1)


@pytest.mark.slow
def test_a_small_real_run_has_the_pace_of_the_model(log: Log, tmp_path: Path) -> None:
    """Of one whose engines set the pace: how busy the machine is hardly matters then."""
    sizes = simulated.Sizes(
        num_generators=2, concurrency=3, sampling_s=0.3, pipeline_depth=48, batch_size=8, step_s=0.02, sync_every=4
    )
    plan = Plan(
        num_generators=2, concurrency=3, sampling_s=0.3, pipeline_depth=48, batch_size=8, step_s=0.02, sync_every=4,
        num_requests=100, shape=simulated.SHAPE,
    )  # fmt: skip
    stop = threading.Event()
    roles = [simulated.generator(log, i, sizes, tmp_path) for i in range(2)]
    roles += [make(log, sizes, tmp_path) for make in simulated.ROLES.values()]
    threads = [threading.Thread(target=role, args=(stop,)) for role in roles]
    for thread in threads:
        thread.start()
    told = ended(log, plan.num_requests, threads)
    stop.set()
    for thread in threads:
        thread.join()
    first, last = told[plan.num_requests // 5], told[plan.num_requests * 4 // 5]
    pace = 0.6 * plan.num_requests / (last - first)
    modelled = ran(plan._replace(drop_share=0.02)).groups_per_s
    assert 1 / 1.5 < pace / modelled < 1.5


def ended(log: Log, num: int, threads: list[threading.Thread]) -> list[float]:
    """When so many groups were consumed, or dropped before there was an example; in order."""
    found: list[float] = []
    with log.assign(log.begin_offsets(topics.FEEDBACK.name)) as reader:
        while len(found) < num:
            told = [decode(Feedback, entry.value) for entry in reader.read(max_records=100, timeout_s=1.0)]
            found += [one.time_s for one in told if one.ending == "consumed" or one.stage == "selector"]
            assert all(thread.is_alive() for thread in threads)
    return sorted(found)
