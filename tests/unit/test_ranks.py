import pytest

from learner.ranks import connect
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
