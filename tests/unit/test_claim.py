import pytest

from learner import checkpoint
from learner.claim import Claim
from streaming import topics
from streaming.errors import SupersededError
from streaming.fencing import epoch_key
from streaming.log.protocol import Output
from streaming.records import Version, encode
from tests.builders import make_feedback, make_weights
from tests.unit.test_checkpoint import FileEngine, make_state


@pytest.fixture
def claim(tmp_path, log):
    """Claims the next epoch, as a start of the learner does."""
    claims = []

    def take(**fields):
        claims.append(Claim(tmp_path / "checkpoints", log, "policy", **fields))
        return claims[-1]

    yield take
    for one in claims:
        one.close()


@pytest.fixture
def commit(tmp_path, log, ranks):
    """Commits a checkpoint of an epoch, which has announced a version before."""

    def save(epoch, step, engine=None, **settings):
        announce(log, Version(epoch, 0))
        state = make_state(step, epoch=epoch)
        engine = engine or FileEngine()
        return checkpoint.save(tmp_path / "checkpoints", state, engine, ranks, **{"keep": 9, **settings})

    return save


def announce(log, version, **fields):
    weights = make_weights(version, **fields)
    log.append([Output(topics.WEIGHTS.name, epoch_key("policy/full", version.epoch), encode(weights))])


def test_every_start_claims_an_epoch_of_its_own(claim):
    assert [claim().epoch, claim().epoch, claim(at_least=7).epoch, claim().epoch] == [1, 2, 7, 8]


def test_an_epoch_is_newer_than_whatever_the_log_knows(log, claim):
    announce(log, Version(5, 0))
    announce(log, Version(9, 0), policy="other")
    assert claim().epoch == 6


def test_an_older_epoch_is_refused_as_soon_as_a_newer_one_is_claimed(claim):
    first = claim()
    first.refuse_to_be_second()
    second = claim()
    with pytest.raises(SupersededError, match="epoch 2 of this policy is running, this is epoch 1"):
        first.refuse_to_be_second()
    second.refuse_to_be_second()


def test_an_older_epoch_is_refused_by_the_log_where_it_does_not_see_its_heirs_disk(log, claim):
    first = claim()
    announce(log, Version(1, 3))
    announce(log, Version(2, 0), policy="other")
    first.refuse_to_be_second()
    announce(log, Version(2, 0))
    for _ in range(2):
        with pytest.raises(SupersededError, match="epoch 2"):
            first.refuse_to_be_second()


def test_a_claim_starts_from_the_newest_checkpoint(claim, commit):
    claim()
    commit(1, 4)
    assert claim().origin.state.step == 4


def test_what_an_older_epoch_commits_after_its_heir_began_is_never_restored(claim, commit):
    claim()
    commit(1, 4)
    claim()  # epoch 2 starts from step 4
    commit(1, 5)
    assert claim().origin.state.version == Version(1, 4)
    commit(3, 9)
    assert claim().origin.state.version == Version(3, 9)


def test_where_the_heir_began_with_the_initial_model_no_older_checkpoint_counts(claim, commit):
    claim()
    claim()
    commit(1, 5)
    assert claim().origin is None


def test_a_start_that_died_before_it_began_hides_nothing(tmp_path, claim, commit):
    claim()
    checkpoint.claim_epoch(tmp_path / "checkpoints", at_least=2)
    commit(1, 5)
    assert claim().origin.state.version == Version(1, 5)


def test_a_damaged_checkpoint_leaves_the_ancestors_before_it(claim, commit):
    claim()
    commit(1, 3)
    origin = commit(1, 4)
    claim()
    commit(1, 5)
    (origin / checkpoint.STATE).write_bytes(b"torn")
    with pytest.warns(UserWarning, match="step-4 is passed over"):
        assert claim().origin.state.version == Version(1, 3)


def test_checkpoints_of_a_release_without_beginnings_are_ancestors(commit, claim):
    commit(1, 3)
    commit(2, 2)
    assert claim().origin.state.version == Version(2, 2)


def test_a_checkpoint_is_not_committed_where_an_heir_has_begun(tmp_path, claim, commit):
    first = claim()

    class OvertakenEngine(FileEngine):
        def save(self, directory):
            claim()
            return super().save(directory)

    commit(1, 1, still_ours=first.refuse_to_be_second)
    with pytest.raises(SupersededError):
        commit(1, 2, engine=OvertakenEngine(), still_ours=first.refuse_to_be_second)
    assert checkpoint.newest(tmp_path / "checkpoints").state.step == 1


def test_an_older_epoch_removes_no_checkpoint_once_an_heir_has_begun(claim, commit):
    """Its heir may stand on the very one that is to go."""
    first = claim()
    kept = commit(1, 1)
    asked = []

    def still_ours():
        first.refuse_to_be_second()
        if not asked:
            asked.append(claim())  # the heir begins right behind the look before the commit

    with pytest.raises(SupersededError):
        commit(1, 2, keep=1, still_ours=still_ours)
    assert (kept / checkpoint.MANIFEST).exists()
    assert asked[0].origin.directory == kept


def test_the_fence_is_where_the_feedback_ended_when_the_epoch_began(log, claim):
    log.append(Output(topics.FEEDBACK.name, b"%d" % number, encode(make_feedback(number))) for number in range(9))
    [fence] = claim().fences
    ends = {number: end for (_, number), end in log.end_offsets(topics.FEEDBACK.name).items()}
    assert (fence.epoch, dict(fence.ends)) == (1, ends)


def test_the_fences_of_starts_that_announced_nothing_are_kept_on_disk(claim):
    claim()
    claim()
    assert [fence.epoch for fence in claim().fences] == [1, 2, 3]


def test_fences_that_retention_has_passed_are_forgotten(log, claim):
    claim()
    log.append(Output(topics.FEEDBACK.name, b"%d" % number, encode(make_feedback(number))) for number in range(90))
    claim()
    log.trim({place: end // 2 for place, end in log.end_offsets(topics.FEEDBACK.name).items()})
    assert [fence.epoch for fence in claim().fences] == [2, 3]
