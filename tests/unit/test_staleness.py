import msgspec

from learner.staleness import lineage_of, pair_staleness, staleness
from streaming.records import Span, Version
from tests.builders import make_pair, make_response


def test_staleness_counts_versions_within_an_epoch():
    assert staleness(Version(1, 3), Version(1, 5), []) == 2


def test_an_ancestor_in_an_older_epoch_counts_across_the_restart():
    assert staleness(Version(1, 3), Version(2, 6), [Version(1, 4)]) == 3


def test_what_an_older_epoch_published_after_its_last_checkpoint_is_off_the_lineage():
    assert staleness(Version(1, 5), Version(2, 6), [Version(1, 4)]) is None


def test_a_version_of_a_newer_learner_is_off_the_lineage():
    assert staleness(Version(3, 0), Version(2, 6), [Version(1, 4)]) is None


def test_a_pair_is_as_stale_as_its_oldest_token():
    rejected = make_response(spans=[Span(version=Version(1, n), start=n, end=n + 1) for n in range(2, 4)])
    assert pair_staleness(with_rejected(rejected), Version(1, 5), []) == 3


def test_one_token_off_the_lineage_is_enough():
    rejected = make_response(spans=[Span(version=Version(1, 9), start=0, end=1)])
    assert pair_staleness(with_rejected(rejected), Version(2, 5), [Version(1, 4)]) is None


def test_a_first_start_has_no_lineage():
    assert lineage_of(None, [], epoch=1) == []


def test_starts_that_left_no_checkpoint_all_began_at_number_zero():
    assert lineage_of(None, [], epoch=3) == [Version(1, 0), Version(2, 0)]


def test_a_restored_version_ends_its_epoch_and_begins_every_epoch_since():
    older = [Version(1, 4), Version(2, 4)]
    assert lineage_of(Version(3, 9), older, epoch=6) == [*older, Version(3, 9), Version(4, 9), Version(5, 9)]


def with_rejected(rejected):
    """A pair whose chosen side is from version 1.4."""
    return msgspec.structs.replace(make_pair(version=Version(1, 4)), rejected=rejected)
