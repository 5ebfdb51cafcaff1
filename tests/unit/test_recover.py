from pathlib import Path

import pytest
from msgspec.structs import replace

from actors.pacing import Outstanding
from deploy.config import RunConfig, run_directory
from deploy.recover import recover
from deploy.roles import open_run_log
from learner import checkpoint
from learner.claim import Claim
from learner.pairs import ReaderState
from learner.settled import Claim as Taken
from learner.settled import SettledState
from streaming import topics
from streaming.books import newest_carried
from streaming.errors import ConfigError, NotReadyError
from streaming.frontier import IntervalSet
from streaming.log.protocol import Output
from streaming.records import encode
from tests.builders import make_config, make_prompt
from tests.unit.test_checkpoint import FileEngine, make_state

SETTLED = SettledState([(0, 40), (50, 90)], [Taken(95, "content", "settings", 2, [0])])


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return make_config(tmp_path / "run")


@pytest.fixture
def root(config: RunConfig) -> Path:
    return run_directory(config) / "checkpoints" / "policy"


@pytest.fixture
def saved(config, root, ranks):
    """A run whose log is lost: there is a checkpoint of epoch 1, and no log."""
    reader = ReaderState([("pairs.policy", 0, 500)], SETTLED)
    state = replace(make_state(7, issued=60), reader=reader)
    return checkpoint.save(root, state, FileEngine(), ranks, keep=2)


def test_a_new_log_goes_on_with_numbers_that_nobody_had(config, saved):
    [found] = recover(config)
    assert (found.step, found.num_settled, found.next_number, found.next_ordinal) == (7, 80, 96, 60)
    with open_run_log(config) as log:
        carried = newest_carried(log, "policy")
    assert (carried.issued, carried.next_ordinal) == ([(0, 96)], 60)


def test_the_learner_keeps_what_is_settled_and_reads_the_new_log_from_its_beginning(config, saved, root):
    recover(config)
    with open_run_log(config) as log:
        claim = Claim(root, log, "policy")
        assert claim.origin.directory == saved
        assert claim.reader == ReaderState([], SETTLED)
        assert (claim.epoch, [fence.epoch for fence in claim.fences]) == (3, [3])
        claim.close()


def test_offsets_of_the_new_log_are_kept_again(config, saved, root, ranks):
    recover(config)
    with open_run_log(config) as log:
        Claim(root, log, "policy").close()
        checkpoint.save(root, make_state(8, epoch=3), FileEngine(), ranks, keep=2)
        with pytest.raises(NotReadyError, match="the log knows nothing of epoch 3"):
            Claim(root, log, "policy")


def test_without_recovery_another_log_is_refused(config, saved, root):
    with open_run_log(config) as log, pytest.raises(NotReadyError, match="the log knows nothing of epoch 1"):
        Claim(root, log, "policy")


def test_recovering_again_after_a_crash_changes_nothing(config, saved, root):
    first = recover(config)
    assert recover(config) == first
    assert checkpoint.log_began(root) == 2


def test_a_log_that_is_there_is_not_replaced(config, saved):
    with open_run_log(config) as log:
        log.append([Output(topics.PROMPTS.name, b"p", encode(make_prompt(0)))])
    with pytest.raises(ConfigError, match="the log is there: it holds prompts"):
        recover(config)


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(config):
    with pytest.raises(NotReadyError, match="no whole checkpoint"):
        recover(config)


def test_the_scheduler_counts_on_from_what_was_carried() -> None:
    outstanding = Outstanding()
    outstanding.go_on(IntervalSet([(0, 96)]), IntervalSet([(0, 60)]))
    outstanding.issue(make_prompt(20, ordinal=10))
    assert (outstanding.free_numbers(1), outstanding.free_ordinals(1), outstanding.num_train) == ([96], [60], 1)
