import pytest

from deploy.config import RunConfig
from deploy.fleet import MAX_FAILURES, STEADY_S, Backoff, gpus_by_role, is_hopeless, refuse_shared_file
from streaming.errors import ConfigError, DataError, LogError, NonFiniteError, NotReadyError


def config(**learner) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "mine",
            "model": "model",
            "prompts": {"path": "prompts.jsonl"},
            "rewards": [{"name": "length", "function": "reward.py:score"}],
            "learner": learner,
        }
    )


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
        (LogError("", where="", do=""), False),
        (RuntimeError("the actor died"), False),
    ],
)
def test_what_starting_again_cannot_mend_is_not_started_again(error, hopeless):
    assert is_hopeless(error) is hopeless


def test_generators_and_ranks_have_a_gpu_each_and_the_scorer_what_is_left():
    assert gpus_by_role(config(), 0) == {}
    assert gpus_by_role(config(), 2) == {"generator": 1, "learner": 1, "scorer": 0}
    assert gpus_by_role(config(), 3)["scorer"] == 1


def test_too_few_gpus_are_counted_for_the_person():
    with pytest.raises(NotReadyError, match=r"3 GPUs are needed .*, Ray has 2"):
        gpus_by_role(config(world_size=2), 2)


def test_a_log_in_a_file_is_refused_on_a_cluster_of_several_nodes():
    refuse_shared_file("sqlite:///log.db", num_nodes=1)
    refuse_shared_file("kafka://broker:9092", num_nodes=3)
    with pytest.raises(ConfigError, match="the Ray cluster has 3 nodes"):
        refuse_shared_file("sqlite:///log.db", num_nodes=3)
