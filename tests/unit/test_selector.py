import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from streaming.config import SelectionConfig
from streaming.heartbeat import Heartbeat
from streaming.history import entries
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.records import (
    DeadLetter,
    Feedback,
    Implicit,
    Margins,
    Message,
    Pair,
    Priced,
    R,
    ScoredGroup,
    decode,
    encode,
)
from streaming.selector import Selection, Selector, prompt_text, select
from tests.builders import make_candidate, make_group, make_prompt, make_scored


def selected(scored: ScoredGroup, **settings: Any) -> Selection:
    return select(scored, SelectionConfig(**settings), policy="policy")


def roles_of(selection: Selection) -> tuple[int, int | None]:
    assert selection.pair is not None
    return selection.pair.chosen.candidate, selection.pair.rejected and selection.pair.rejected.candidate


def test_the_best_is_chosen_and_the_worst_of_a_small_group_rejected() -> None:
    selection = selected(make_scored([0.5, 0.9, 0.1, 0.6]))
    assert selection.decision == ("dpo", "margin")
    assert roles_of(selection) == (1, 2)
    assert selection.is_worst_rejected


def test_a_pair_carries_everything_that_made_it() -> None:
    scored = make_scored(
        [0.0, 1.0], implicit=[Implicit(model="sampled", h=[0.5, 2.0])], reference_logprobs=[-1.0, -2.0]
    )
    pair = selected(scored).pair
    assert pair is not None and pair.rejected is not None
    assert pair.margins == Margins(external=1.0, implicit=1.5)
    assert (pair.rating_gap, pair.spread) == (1.0, 0.5)
    assert (pair.chosen.reward, pair.chosen.reference_logprob, pair.rejected.reference_logprob) == (1.0, -2.0, -1.0)
    assert pair.chosen.tokens == scored.group.candidates[1].tokens
    assert pair.content_hash == scored.group.content_hash
    assert decode(Pair, encode(pair)) == pair


def test_a_negative_implicit_margin_does_not_keep_a_pair_from_teaching() -> None:
    scored = make_scored([1.0, 0.0], implicit=[Implicit(model="sampled", h=[-50.0, 50.0])])
    assert selected(scored).decision == ("dpo", "margin")


def test_the_same_group_and_settings_give_the_same_pair() -> None:
    assert selected(make_scored()) == selected(make_scored())
    first, other = selected(make_scored()).pair, selected(make_scored(), min_margin=0.5).pair
    assert first is not None and other is not None
    assert first.pair_id != other.pair_id


def test_the_number_of_selectors_makes_no_other_pair() -> None:
    assert SelectionConfig(num_processes=4).settings_hash == SelectionConfig().settings_hash
    assert SelectionConfig(num_sigmas=1.0).settings_hash != SelectionConfig().settings_hash


def test_equal_texts_never_meet_in_a_pair() -> None:
    selection = selected(make_scored([1.0, 0.0, 0.5], texts=["a", "a", "b"]))
    assert roles_of(selection) == (0, 2)


def test_one_text_alone_is_an_sft_example_where_it_is_good() -> None:
    scored = make_scored([1.0, 1.0], texts=["a", "a"])
    assert selected(scored).decision == ("drop", "identical")
    selection = selected(scored, sft_floor=1.0)
    assert selection.decision == ("sft", "identical")
    assert roles_of(selection) == (0, None)
    assert selection.pair is not None and selection.pair.margins == Margins()


def test_ties_with_good_answers_become_sft_examples() -> None:
    assert selected(make_scored([1.0, 1.0]), sft_floor=0.5).decision == ("sft", "no_spread")
    assert selected(make_scored([0.0, 0.0]), sft_floor=0.5).decision == ("drop", "no_spread")


def test_a_small_margin_is_a_tie() -> None:
    assert selected(make_scored([1.0, 0.8]), min_margin=0.3).decision == ("drop", "small_margin")


def test_an_sft_example_ended_by_itself_even_where_a_truncated_answer_is_better() -> None:
    group = make_group(candidates=[make_candidate("a", has_eos=False), make_candidate("b")])
    selection = selected(make_scored([1.0, 0.9], group=group), min_margin=0.3, sft_floor=0.5)
    assert selection.decision == ("sft", "small_margin")
    assert roles_of(selection) == (1, None)


def test_a_group_of_truncated_answers_makes_no_sft_example() -> None:
    group = make_group(candidates=[make_candidate("a", has_eos=False), make_candidate("b", has_eos=False)])
    assert selected(make_scored([1.0, 1.0], group=group), sft_floor=0.5).decision == ("drop", "truncated")


def test_a_candidate_without_a_reward_takes_no_part() -> None:
    assert roles_of(selected(make_scored([1.0, None, 0.5]))) == (0, 2)
    assert selected(make_scored([1.0, None]), sft_floor=0.5).decision == ("sft", "single")


def test_a_group_without_rewards_is_dropped_with_that_reason() -> None:
    assert selected(make_scored([None, None])).decision == ("drop", "reward_missing")


def test_a_candidate_without_a_finite_reference_takes_no_part() -> None:
    scored = make_scored([1.0, 0.5, 0.0], reference_logprobs=[float("nan"), -1.0, -1.0])
    assert roles_of(selected(scored)) == (1, 2)
    scored = make_scored([1.0, 0.5], reference_logprobs=[float("nan"), float("-inf")])
    assert selected(scored).decision == ("drop", "non_finite")


def test_a_candidate_without_tokens_takes_no_part() -> None:
    group = make_group(candidates=[make_candidate("", tokens=[]), make_candidate("b", tokens=[])])
    assert selected(make_scored([1.0, 0.0], group=group)).decision == ("drop", "empty")
    assert selected(make_scored([], group=make_group([]))).decision == ("drop", "empty")


def test_it_is_told_when_the_sweet_spot_is_not_the_worst() -> None:
    selection = selected(make_scored([*[10.0] * 18, 9.0, 7.0, -3.0]))
    assert roles_of(selection) == (0, 19)
    assert selection.is_worst_rejected is False


@pytest.mark.parametrize("rule", ["max_min", "sweet_spot", "quantile"])
def test_every_rule_finds_the_only_wrong_answer(rule: str) -> None:
    assert roles_of(selected(make_scored([*[1.0] * 31, 0.0]), rule=rule)) == (0, 31)


def test_a_policy_that_did_not_sample_learns_by_its_own_reference_and_owns_no_sampled_log_prob() -> None:
    scored = make_scored(
        [0.0, 1.0],
        reference_logprobs=[-1.0, -2.0],
        implicit=[Implicit(model="sampled", h=[0.5, 2.0])],
        further=[Priced(version="its own", logprobs=[-3.0, -4.0], policies=["b"])],
    )
    pair = select(scored, SelectionConfig(), policy="b").pair
    assert pair is not None and pair.rejected is not None
    assert (pair.sampled_by, pair.margins) == ("policy", Margins(external=1.0))
    assert (pair.reference_version, pair.chosen.reference_logprob, pair.rejected.reference_logprob) == (
        "its own",
        -4.0,
        -3.0,
    )
    own = selected(scored).pair
    assert own is not None and own.sampled_by is None


def test_a_group_that_the_policys_reference_did_not_price_is_dropped_with_that_reason() -> None:
    assert select(make_scored(), SelectionConfig(), policy="b").decision == ("drop", "reference")


def test_a_conversation_is_readable() -> None:
    request = make_prompt(
        text=None, messages=[Message(role="system", content="Be brief."), Message(role="user", content="Hi")]
    )
    assert prompt_text(request) == "system: Be brief.\nuser: Hi"


def send(log: Log, *groups: ScoredGroup) -> None:
    log.append(Output("scored", scored.group.group_id.encode(), encode(scored)) for scored in groups)


def run(log: Log, *, policy: str = "policy", **settings: Any) -> Metrics:
    """Select from everything that is there."""
    metrics = Metrics("selector")
    heartbeat = Heartbeat(log, metrics, role="selector", interval_s=3600)
    selector = Selector(log, metrics, heartbeat, config=SelectionConfig(**settings), policy=policy)
    stage = selector.stage()
    with log.subscribe(f"selector.{policy}", ["scored"]) as consumer:
        while stage.run_once(consumer, timeout_s=0):
            pass
    heartbeat.close()
    return metrics


def records(log: Log, kind: type[R], topic: str) -> list[R]:
    return [decode(kind, entry.value) for entry in entries(log, topic)]


def test_a_pair_goes_to_its_policys_topic_under_its_id_and_its_groups(log: Log) -> None:
    scored = make_scored(
        [1.0, 0.0], group=make_group(policy="tiny"), implicit=[Implicit(model="sampled", h=[0.5, 0.0])]
    )
    send(log, scored)
    metrics = run(log, policy="tiny")
    [entry] = entries(log, "pairs.tiny")
    pair = decode(Pair, entry.value)
    assert entry.key == f"{pair.pair_id}.{pair.group_id}".encode()
    assert pair.policy == "tiny"
    assert pair.source is not None and pair.source.topic == "scored"
    assert records(log, Feedback, "feedback") == []
    assert metrics.value("routed_total", route="dpo", reason="margin") == 1
    assert [metrics.value("margin_bucket", kind="external", le=bound) for bound in ("0.5", "1.0")] == [0, 1]
    assert [metrics.value("margin_bucket", kind="implicit", le=bound) for bound in ("0.0", "0.5")] == [0, 1]


def test_a_dropped_group_ends_its_request_with_the_reason(log: Log) -> None:
    scored = make_scored([0.5, 0.5], number=4)
    send(log, scored)
    metrics = run(log)
    [feedback] = records(log, Feedback, "feedback")
    assert (feedback.request_number, feedback.ending, feedback.reason) == (4, "dropped", "no_spread")
    assert (feedback.route, feedback.stage, feedback.content_hash) == ("drop", "selector", scored.group.content_hash)
    assert (feedback.mean_reward, feedback.spread, feedback.margin) == (0.5, 0.0, 0.0)
    assert metrics.value("routed_total", route="drop", reason="no_spread") == 1
    assert metrics.value("endings_total", ending="dropped", reason="no_spread") == 1


def test_of_two_samplings_of_one_request_the_first_makes_the_example(log: Log) -> None:
    send(log, make_scored([0.5, 0.5], texts=["a", "b"]), make_scored([1.0, 0.0], texts=["c", "d"]))
    assert run(log).value("duplicates_total", topic="scored") == 1
    send(log, make_scored([1.0, 0.0], texts=["e", "f"]))
    assert run(log).value("duplicates_total", topic="scored") == 1, "it is known after a restart too"
    assert records(log, Pair, "pairs.policy") == []
    assert len(records(log, Feedback, "feedback")) == 1


def test_two_policies_select_from_the_same_groups(log: Log) -> None:
    send(log, make_scored(shared_by=["one", "other"]))
    run(log, policy="one")
    run(log, policy="other", min_margin=5.0)
    assert len(records(log, Pair, "pairs.one")) == 1
    assert [feedback.policy for feedback in records(log, Feedback, "feedback")] == ["other"]


def break_prices(scored: dict[str, Any]) -> None:
    scored["reference_logprobs"] = "lost"


def break_tokens(scored: dict[str, Any]) -> None:
    scored["group"]["candidates"][0]["tokens"] = ["lost"]


@pytest.mark.parametrize("damage", [break_prices, break_tokens])
@pytest.mark.fault("poison", backend="sqlite")
def test_a_broken_record_is_a_dead_letter_and_ends_its_request_where_that_can_be_read(
    log: Log, damage: Callable[[dict[str, Any]], None]
) -> None:
    broken = msgspec.msgpack.decode(encode(make_scored(number=3)))
    damage(broken)
    log.append([Output("scored", b"k", b"junk"), Output("scored", b"k", msgspec.msgpack.encode(broken))])
    run(log)
    assert len(records(log, DeadLetter, "dead-letter")) == 2
    [feedback] = records(log, Feedback, "feedback")
    assert (feedback.request_number, feedback.ending, feedback.policy) == (3, "dead_lettered", "policy")


def test_how_often_the_rule_matters_is_counted(log: Log) -> None:
    send(log, make_scored([*[10.0] * 18, 9.0, 7.0, -3.0]), make_scored(number=1))
    assert run(log).value("rejected_not_worst_total") == 1


def test_the_role_selects_until_it_is_stopped(log: Log) -> None:
    metrics, stop = Metrics("selector"), threading.Event()
    heartbeat = Heartbeat(log, metrics, role="selector", interval_s=3600)
    selector = Selector(log, metrics, heartbeat, config=SelectionConfig(), policy="policy")
    thread = threading.Thread(target=selector.run, args=(stop,))
    thread.start()
    with log.assign(log.begin_offsets("pairs.policy")) as reader:
        send(log, make_scored())
        assert len(reader.read(max_records=1, timeout_s=20.0)) == 1
    stop.set()
    thread.join(20.0)
    assert not thread.is_alive()
    assert heartbeat.state.numbers["dpo"] == 1.0
    heartbeat.close()
