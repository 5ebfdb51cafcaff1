from learner.off_policy import LOOK_S, Samplers, has_selected_all
from streaming.log.protocol import Log, Output
from streaming.records import Version, WeightVersion, encode
from tests.builders import make_pair, make_scored, make_weights
from tests.fakes import Clock


def publish(log: Log, version: Version, *, policy: str = "a", lineage: list[Version] | None = None) -> None:
    record: WeightVersion = make_weights(version, policy=policy, lineage=lineage or [])
    log.append([Output("weights", f"{policy}/full".encode(), encode(record))])


def age(samplers: Samplers, version: Version) -> int | None:
    return samplers.age(make_pair(policy="b", sampled_by="a", version=version))


def test_a_pair_is_as_old_as_its_sampler_has_published_versions_since(log: Log) -> None:
    publish(log, Version(1, 7))
    publish(log, Version(1, 90), policy="b")
    assert age(Samplers(log), Version(1, 4)) == 3


def test_a_version_that_was_published_after_the_last_look_is_new_and_not_off_the_lineage(log: Log) -> None:
    clock = Clock()
    samplers = Samplers(log, now=clock)
    publish(log, Version(1, 1))
    assert age(samplers, Version(1, 1)) == 0
    publish(log, Version(1, 2))
    assert age(samplers, Version(1, 2)) == 0
    assert age(samplers, Version(1, 1)) == 1


def test_ages_grow_with_the_sampler_after_a_moment(log: Log) -> None:
    clock = Clock()
    samplers = Samplers(log, now=clock)
    publish(log, Version(1, 1))
    assert age(samplers, Version(1, 1)) == 0
    publish(log, Version(1, 5))
    clock.advance(LOOK_S)
    assert age(samplers, Version(1, 1)) == 4


def test_what_a_sampler_lost_in_a_crash_has_no_age(log: Log) -> None:
    publish(log, Version(2, 6), lineage=[Version(1, 5)])
    samplers = Samplers(log)
    assert age(samplers, Version(1, 5)) == 1
    assert age(samplers, Version(1, 6)) is None


def test_a_sampler_that_published_nothing_gives_no_age(log: Log) -> None:
    assert age(Samplers(log), Version(1, 0)) is None


def test_a_policys_selectors_are_through_once_they_have_committed_every_scored_group(log: Log) -> None:
    assert has_selected_all(log, "b")
    log.append([Output("scored", b"k", encode(make_scored()))])
    assert not has_selected_all(log, "b")
    with log.subscribe("selector.b", ["scored"]) as consumer:
        [entry] = consumer.read(max_records=9, timeout_s=1.0)
        assert not has_selected_all(log, "b")
        consumer.commit({(entry.topic, entry.partition): entry.offset + 1})
    assert has_selected_all(log, "b")
    assert not has_selected_all(log, "c")
