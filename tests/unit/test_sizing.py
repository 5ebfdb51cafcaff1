"""The guide to sizes: what is measured decides it."""

from typing import Any

import pytest

from tests.bench.sizing import Measured, ceilings, guide, measured, num_brokers, size

PACE = 200
BUSY = {"scheduler": 0.2, "scorer": 1.5, "selector": 0.5, "learner": 0.4, "generator": 1.0, "broker": 1.0}
IDLE = {"scheduler": 10.0, "scorer": 0.0, "selector": 0.0, "learner": 20.0, "generator": 5.0, "broker": 0.0}
KILOBYTES = {"candidates": 140.0, "scored": 140.0, "pairs.policy": 10.0}


def found(**changed: float) -> Measured:
    """What the rows of `bench_costs` say, with other milliseconds per group for some roles."""
    rows: list[dict[str, Any]] = []
    for role, ms in (BUSY | changed).items():
        rows.append({"name": f"cost: {role} on Kafka, of a group ({PACE} groups/s, load 1.0)", "ours": ms})
        rows.append({"name": f"cost: {role} on Kafka, with nothing to do (load 1.0)", "ours": IDLE[role]})
        rows.append({"name": f"cost: {role} on SQLite, of a group ({PACE} groups/s, load 1.0)", "ours": 1e6})
    rows += [{"name": f"cost: bytes in {topic} on Kafka", "ours": size} for topic, size in KILOBYTES.items()]
    rows.append({"name": "cost: broker on Kafka, of an idle generator (load 1.0)", "ours": 2.0})
    return measured(rows, "Kafka")


def test_what_a_role_spends_on_looking_for_work_is_no_groups_cost() -> None:
    costs = found().costs
    assert costs.schedule_s == pytest.approx(0.2e-3 - 10e-3 / PACE)
    assert costs.lead_s == pytest.approx(0.4e-3 - 20e-3 / PACE)
    assert costs.score_s == pytest.approx(1.5e-3)
    assert found().idle_broker_s == pytest.approx(2e-3)


def test_the_first_bottleneck_is_named_with_its_number() -> None:
    assert ceilings(found())[0] == ("scorer", pytest.approx(1 / 1.5e-3))
    assert ceilings(found(scheduler=9.0))[0][0] == "scheduler"
    assert "the scorer, at 667 groups/s" in guide(found(), [])


def test_every_generator_has_a_partition_and_every_record_three_copies() -> None:
    for number in (1, 3, 20):
        sized = size(number, found())
        assert sized.partitions >= max(number, sized.plan.num_scorers, sized.plan.num_selectors)
        assert sized.brokers >= 3
    assert len(guide(found(), [sized] * 5).splitlines()) < 40


def test_processes_are_counted_by_what_a_group_costs() -> None:
    once, thrice = (size(64, found(scorer=ms)).plan.num_scorers for ms in (112.0, 336.0))
    assert (once, thrice) == (3, 8)


def test_brokers_are_counted_by_whatever_is_full_first() -> None:
    assert num_brokers(8, 2.0, 8, found()) == 3
    assert num_brokers(8, 1999.0, 8, found(broker=10.0)) == 15, "processor time: 60 cores at half of their time"
    assert num_brokers(8, 5000.0, 8, found(broker=0.1)) == 12, "bytes: 290 KB in, twice copied on, once out"
    assert num_brokers(4096, 1.0, 4096, found(broker=0.1)) == 10, "36,864 replicas of partitions"
