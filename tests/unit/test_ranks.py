import pytest

from learner.ranks import connect, local_rank
from streaming.errors import NotReadyError


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, "WORLD_SIZE is 1, learner.world_size is 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "not set: MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE is 4"),
    ],
)
def test_a_rank_that_was_started_wrongly_says_what_is_missing(environment, problem):
    with pytest.raises(NotReadyError, match=problem):
        connect(2, environment)


def test_a_rank_alone_needs_no_environment_and_talks_to_itself():
    with connect(1, {}) as ranks:
        assert ranks.is_first
        assert ranks.share(b"decision") == b"decision"
        assert ranks.gather(b"mine") == [b"mine"]
        assert ranks.total([1.0, 2.0]) == [1.0, 2.0]
        ranks.barrier()


@pytest.mark.parametrize(
    ("environment", "num_devices", "device"),
    [
        ({}, 8, 0),
        ({"RANK": "3"}, 8, 3),
        ({"RANK": "9"}, 8, 1),  # of the second node: it used to take a tenth device
        ({"RANK": "9", "LOCAL_RANK": "0"}, 1, 0),
        ({"RANK": "9"}, 0, 0),
    ],
)
def test_a_rank_takes_a_device_of_its_own_node(environment, num_devices, device):
    assert local_rank(environment, num_devices) == device
