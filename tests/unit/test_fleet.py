import pytest

from deploy.config import RunConfig
from deploy.fleet import MAX_FAILURES, STEADY_S, Backoff, gpus_by_role, in_units, is_hopeless, refuse_shared_file, turn
from deploy.roles import Process, may_join, policy_of, port_of, processes
from streaming.errors import ConfigError, DataError, LogError, NonFiniteError, NotReadyError, SupersededError
from tests.builders import make_config


def two_policies() -> RunConfig:
    return make_config(learner={"world_size": 2}, policies={"b": {"learner": {"world_size": 1}}})


def test_every_policy_has_a_selector_and_the_ranks_of_each_learner_start_together():
    units = in_units(processes(two_policies()))
    assert [[process.role_id for process in unit] for unit in units] == [
        ["generator-0"],
        ["learner-0", "learner-1"],
        ["learner.b-0"],
        ["scorer-0"],
        ["selector-0"],
        ["selector.b-0"],
        ["scheduler-0"],
    ]


def test_scorers_and_selectors_may_be_several():
    shared = make_config(scoring={"num_processes": 2}, selection={"num_processes": 2}, policies={"b": {}})
    ids = [process.role_id for process in processes(shared)]
    assert [one for one in ids if "scorer" in one or "selector" in one] == [
        "scorer-0", "scorer-1", "selector-0", "selector-1", "selector.b-0", "selector.b-1",
    ]  # fmt: skip


def test_more_generators_scorers_and_selectors_may_join_a_run_and_nothing_else():
    settings = two_policies()
    may = [role for role in ("generator", "scorer", "selector", "selector.b") if may_join(settings, Process(role, 7))]
    assert may == ["generator", "scorer", "selector", "selector.b"]
    for role in ("learner", "scheduler", "selector.c", "generator.b", "poet"):
        assert not may_join(settings, Process(role, 7))
    assert not may_join(settings, Process("generator", -1))


def test_a_process_that_has_joined_takes_no_other_ones_port():
    settings = make_config(metrics={"port": 9000})
    assert [port_of(settings, process) for process in processes(settings)] == [9000, 9001, 9002, 9003, 9004]
    assert port_of(settings, Process("generator", 1)) is None


def test_processes_of_a_kind_take_nodes_in_turn():
    settings = make_config(generation={"num_generators": 4})
    every = processes(settings)
    turns = [turn(process, every) for process in every if process.kind in ("generator", "scorer", "selector")]
    assert turns == [0, 1, 2, 3, 4, 5], "a learner between them takes no turn"


def test_a_role_finds_the_settings_of_its_policy():
    config = two_policies()
    sizes = {one.role_id: policy_of(config, one).learner.world_size for one in processes(config) if one.policy}
    assert sizes == {"learner.b-0": 1, "selector.b-0": 1}
    assert {policy_of(config, one).name for one in processes(config) if not one.policy} == {"policy"}


def test_every_learner_takes_gpus():
    assert gpus_by_role(two_policies(), 4) == {"generator": 1, "learner": 1, "scorer": 0}
    with pytest.raises(NotReadyError, match="4 GPUs are needed"):
        gpus_by_role(two_policies(), 3)


def test_every_quick_failure_waits_twice_as_long_until_it_is_given_up():
    backoff = Backoff()
    waits = [backoff.failed(1.0) for _ in range(MAX_FAILURES)]
    assert waits == [1.0, 2.0, 4.0, 8.0, None]


def test_a_process_that_lived_long_is_no_crash_loop():
    backoff = Backoff()
    for _ in range(3 * MAX_FAILURES):
        assert backoff.failed(STEADY_S) == 1.0


@pytest.mark.parametrize(
    ("error", "hopeless"),
    [
        (ConfigError("", where="", do=""), True),
        (DataError("", where="", do=""), True),
        (NotReadyError("", where="", do=""), True),
        (NonFiniteError("", where="", do=""), True),
        (SupersededError("", where="", do=""), True),
        (LogError("", where="", do=""), False),
        (RuntimeError("the actor died"), False),
    ],
)
def test_what_starting_again_cannot_mend_is_not_started_again(error, hopeless):
    assert is_hopeless(error) is hopeless


def test_generators_and_ranks_have_a_gpu_each_and_the_scorer_what_is_left():
    assert gpus_by_role(make_config(), 0) == {}
    assert gpus_by_role(make_config(), 2) == {"generator": 1, "learner": 1, "scorer": 0}
    assert gpus_by_role(make_config(), 3)["scorer"] == 1


def test_too_few_gpus_are_counted_for_the_person():
    with pytest.raises(NotReadyError, match=r"3 GPUs are needed .*, there are 2"):
        gpus_by_role(make_config(learner={"world_size": 2}), 2)


def test_a_log_in_a_file_is_refused_on_a_cluster_of_several_nodes():
    refuse_shared_file("sqlite:///log.db", num_nodes=1)
    refuse_shared_file("kafka://broker:9092", num_nodes=3)
    with pytest.raises(ConfigError, match="the Ray cluster has 3 nodes"):
        refuse_shared_file("sqlite:///log.db", num_nodes=3)
