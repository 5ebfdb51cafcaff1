"""A healthy recorded run has no violation; each promise is broken once, and the checker names what broke it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from learner import checkpoint
from learner.checkpoint import Layout, State
from learner.pairs import ReaderState
from learner.ranks import Ranks
from learner.settled import Settled
from streaming import topics
from streaming.log import open_log
from streaming.log.protocol import Log, Output
from streaming.records import Pair, Span, Version, encode
from tests.builders import make_candidate, make_feedback, make_group, make_prompt, make_weights
from tests.checker import Acknowledged, Violation, check, unfinished
from tests.recorded import append, record_request, trained

MAX_STALENESS = 3
"""What request 4 has when it is the fourth to be trained on: every token is of the first version."""


class NoEngine:
    """An engine without state."""

    def save(self, directory: Path) -> list[Path]:
        return []


@dataclass
class Run:
    """A recorded run: its log, its checkpoints, and a ledger of what the learner trained on."""

    log: Log
    root: Path
    ranks: Ranks
    settled: Settled = field(default_factory=Settled)
    step: int = 0

    def train(self, pair: Pair, *, epoch: int = 1, **fields: object) -> None:
        """A step on this pair alone, and the version after it."""
        self.step += 1
        self.settled.settle(pair)
        for ending in ("consumed", "trained"):
            self.tell(pair, ending, epoch=epoch, **fields)
        self.publish(Version(epoch, self.step))

    def tell(self, pair: Pair, ending: str, **fields: object) -> None:
        told = trained(pair, ending=ending, step=self.step)
        told = msgspec.structs.replace(told, **{"staleness": 0, **fields})
        append(self.log, topics.FEEDBACK.name, pair.group_id, told)

    def publish(self, version: Version) -> None:
        append(self.log, topics.WEIGHTS.name, f"policy/{version}", make_weights(version, step=version.number))

    def save(self, *, epoch: int = 1) -> None:
        """A checkpoint of everything so far."""
        ends = self.log.end_offsets(topics.pairs("policy").name)
        offsets = [(topic, partition, offset) for (topic, partition), offset in ends.items()]
        state = State(
            step=self.step, version=Version(epoch, self.step), lineage=[], layout=Layout(1, 0, "float32"),
            reader=ReaderState(offsets, self.settled.state()), endings=[],
        )  # fmt: skip
        checkpoint.save(self.root, state, NoEngine(), self.ranks, keep=9)

    def commit_all(self) -> None:
        """Every stage has settled everything."""
        for group, topic in (("generators", topics.PROMPTS), ("scorer", topics.CANDIDATES)):
            self.commit(group, topic)
        self.commit(topics.selectors("policy"), topics.SCORED)

    def commit(self, group: str, topic: topics.Topic) -> None:
        with self.log.subscribe(group, [topic.name]) as consumer:
            consumer.read(max_records=1, timeout_s=0)
            consumer.commit(self.log.end_offsets(topic.name))

    def violations(self) -> list[Violation]:
        return check(self.log, policy="policy", checkpoints=self.root, max_staleness=MAX_STALENESS)

    def broken(self) -> dict[str, tuple[object, ...]]:
        """What each broken invariant names."""
        return {one.invariant: one.ids for one in self.violations()}


@pytest.fixture
def run(tmp_path: Path, ranks: Ranks) -> Iterator[Run]:
    """Requests 0 to 2 are trained on, 3 is a tie; then everything is saved and committed."""
    with open_log(f"sqlite:///{tmp_path}/log.db", run="test") as log:
        run = Run(log, tmp_path / "checkpoints", ranks)
        run.publish(Version(1, 0))
        for number in range(3):
            run.train(record_request(log, number))
        assert record_request(log, 3, (0.0, 0.0)) is None
        run.save()
        run.commit_all()
        yield run


def one_more(run: Run, number: int = 4) -> Pair:
    """A request more, on its way to the learner."""
    pair = record_request(run.log, number)
    assert pair is not None
    run.commit_all()
    return pair


def test_a_healthy_run_has_no_violation_and_nothing_left_to_do(run: Run) -> None:
    assert run.violations() == []
    assert unfinished(run.log, policy="policy", checkpoints=run.root) == []


def test_a_request_that_ended_no_way_and_is_nowhere_is_lost(run: Run) -> None:
    append(run.log, topics.PROMPTS.name, "p4", make_prompt(4))
    assert run.broken() == {}  # it is in front of the generators
    run.commit("generators", topics.PROMPTS)
    assert run.broken() == {"lost": (4,), "balance": (4,)}


def test_a_request_in_front_of_any_stage_is_backlog_and_not_lost(run: Run) -> None:
    record_request(run.log, 4)
    assert run.broken() == {}
    run.commit_all()
    assert run.broken() == {}  # its pair is in front of the learner
    assert [one.ids for one in unfinished(run.log, policy="policy", checkpoints=run.root)] == [(4,)]


def test_a_number_that_was_never_issued_is_lost(run: Run) -> None:
    run.train(one_more(run, number=5))
    run.save()
    assert run.broken() == {"lost": (4,)}


def test_an_example_in_two_surviving_steps_is_trained_twice(run: Run) -> None:
    pair = one_more(run)
    run.train(pair)
    run.train(pair)
    run.save()
    assert run.broken()["trained twice"] == ("(4, 0) in [(1, 4), (1, 5)]",)


def test_a_step_that_no_checkpoint_has_may_be_taken_again(run: Run) -> None:
    pair = one_more(run)
    run.step += 1
    run.tell(pair, "consumed")  # then the learner died, and its heir took the step again
    run.step -= 1
    checkpoint.claim_epoch(run.root, at_least=2)
    checkpoint.write_beginning(run.root, 2, checkpoint.newest(run.root), [])
    run.train(pair, epoch=2)
    run.save(epoch=2)
    assert run.broken() == {}


def test_two_contents_of_a_request_may_not_both_be_trained(run: Run) -> None:
    pair, again = one_more(run), make_group(["x", "y"], number=4)
    run.train(pair)
    run.tell(pair, "consumed", content_hash=again.content_hash)
    run.save()
    assert run.broken()["trained twice"] == (4,)


def test_a_trained_example_that_the_checkpoint_does_not_know_is_forgotten(run: Run) -> None:
    pair, settled = one_more(run), run.settled.state()
    run.train(pair)
    run.settled = Settled(settled)
    run.save()
    assert run.broken()["forgotten"] == ((4, 0),)


def test_an_example_called_trained_that_no_checkpoint_has_is_named(run: Run) -> None:
    run.train(one_more(run))
    assert run.broken()["forgotten"] == ((4, 0, 1, 4),)


@pytest.mark.parametrize("ending", ["dropped", "dead_lettered"])
def test_two_different_endings_of_an_example_are_named(run: Run, ending: str) -> None:
    append(run.log, topics.FEEDBACK.name, make_prompt(0).group_id, make_feedback(0, ending=ending))
    assert run.broken() == {"ended twice": (f"(0, 0): {ending} by test (), trained by learner (1/1)",)}


def test_the_same_ending_told_twice_is_one_ending(run: Run) -> None:
    append(run.log, topics.FEEDBACK.name, make_prompt(3).group_id, make_feedback(3, ending="dropped"))
    assert run.broken() == {}


@pytest.mark.parametrize("number", [3, 2])
def test_a_published_number_that_does_not_rise_within_its_epoch_is_named(run: Run, number: int) -> None:
    append(run.log, topics.WEIGHTS.name, "policy/again", make_weights(Version(1, number), step=9))
    assert run.broken() == {"versions": (f"1.{number} at weights/0@4",)}


def test_a_version_that_was_sent_twice_is_one_version(run: Run) -> None:
    run.publish(Version(1, 3))
    assert run.broken() == {}


def test_a_lower_number_in_a_newer_epoch_is_right(run: Run) -> None:
    run.publish(Version(2, 1))
    assert run.broken() == {}


def test_a_candidate_that_goes_back_to_an_older_version_is_named(run: Run) -> None:
    spans = [Span(version=Version(1, 2), start=0, end=1), Span(version=Version(1, 1), start=1, end=2)]
    append(run.log, topics.CANDIDATES.name, "g", make_group(request=make_prompt(0), candidates=[sampled(spans)]))
    assert list(run.broken()) == ["versions"]


def test_a_version_that_nobody_published_cannot_have_sampled(run: Run) -> None:
    spans = [Span(version=Version(1, 9), start=0, end=2)]
    append(run.log, topics.CANDIDATES.name, "g", make_group(request=make_prompt(0), candidates=[sampled(spans)]))
    assert run.broken()["versions"] == ("1.9",)


def sampled(spans: list[Span]):
    return make_candidate("a", spans=spans)


@pytest.mark.parametrize("staleness", [4, None])
def test_an_example_trained_on_beyond_the_bound_is_named(run: Run, staleness: int | None) -> None:
    run.train(one_more(run), staleness=staleness)
    run.save()
    assert run.broken() == {"staleness": (f"4: {staleness}",)}


def test_staleness_is_worked_out_from_the_versions_whatever_the_learner_says(run: Run) -> None:
    run.train(one_more(run))
    run.train(one_more(run, number=5), staleness=0)
    run.save()
    assert run.broken() == {"staleness": ("5: 4",)}


def test_a_group_that_a_stage_passed_over_breaks_its_balance(run: Run) -> None:
    request = make_prompt(4)
    append(run.log, topics.PROMPTS.name, "p4", request)
    group = make_group(request=request)
    append(run.log, topics.CANDIDATES.name, group.group_id, group)
    run.commit_all()
    assert [str(one) for one in run.violations() if one.invariant == "balance"] == [
        "balance: scorer: went in and nothing came out: 4"
    ]


def test_what_comes_out_of_a_stage_and_never_went_in_breaks_its_balance(run: Run) -> None:
    group = make_group(number=7)
    append(run.log, topics.CANDIDATES.name, group.group_id, group)
    assert run.broken() == {"balance": (7,)}


def test_poison_behind_the_committed_offset_has_to_be_a_dead_letter(run: Run) -> None:
    run.log.append([Output(topics.SCORED.name, b"k", b"\xc1 poison")])
    assert run.broken() == {}  # in front of the selector
    run.commit_all()
    assert list(run.broken()) == ["poison"]


def test_feedback_about_a_request_that_nobody_issued_is_named(run: Run) -> None:
    append(run.log, topics.FEEDBACK.name, "g", make_feedback(9, ending="dropped"))
    assert run.broken() == {"unknown": (9,)}


def test_a_trained_pair_has_to_lie_in_the_log_with_its_content(run: Run) -> None:
    pair = one_more(run)
    run.train(pair, content_hash="another")
    run.save()
    assert run.broken()["unknown"] == (f"4: {pair.pair_id}",)


def test_an_acknowledged_append_has_to_be_where_it_was_said_to_be(run: Run) -> None:
    [(partition, offset)] = run.log.append([Output(topics.PROMPTS.name, b"k", value := encode(make_prompt(0)))])
    there = Acknowledged(topics.PROMPTS.name, partition, offset, value)
    gone = there._replace(offset=offset + 1)
    assert check(run.log, policy="policy", acknowledged=[there]) == check(run.log, policy="policy")
    [found, *_] = check(run.log, policy="policy", acknowledged=[there, gone])
    assert found.ids == (f"prompts/{partition}@{offset + 1}",)


def test_what_was_redriven_has_ended_once_it_ends_again(run: Run) -> None:
    request = make_prompt(4)
    append(run.log, topics.PROMPTS.name, "p4", request)
    run.commit_all()
    for ending in ("dead_lettered", "redriven"):
        append(run.log, topics.FEEDBACK.name, request.group_id, make_feedback(4, ending=ending, stage="generator"))
    assert run.broken()["lost"] == (4,)
    append(run.log, topics.FEEDBACK.name, request.group_id, make_feedback(4, ending="dropped", stage="generator"))
    assert run.broken() == {}


def test_responses_of_another_lineage_are_infinitely_stale(run: Run) -> None:
    pair = one_more(run)
    run.publish(Version(2, 3))  # its lineage does not have 1.0, which sampled the pair
    run.step += 1
    run.settled.settle(pair)
    run.tell(pair, "consumed", epoch=2)
    run.tell(pair, "trained", epoch=2)
    run.save(epoch=2)
    assert run.broken()["staleness"] == ("4: inf",)
