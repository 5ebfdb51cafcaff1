import io
import json

import msgspec
import pytest
from rich.console import Console

from deploy.trace import Trace, trace
from deploy.trace_page import as_json, page
from streaming import topics
from streaming.errors import ConfigError
from streaming.fencing import fence_at_the_end
from streaming.log.protocol import Log, Output
from streaming.records import Fence, Message, Span, Version
from tests.builders import make_candidate, make_group, make_prompt, make_rewards, make_role, make_scored, make_weights
from tests.recorded import SETTINGS, append, record_request, record_selection, record_step


def one(log: Log, sought: str) -> Trace:
    [found] = trace(log, ["policy"], sought)
    return found


def text_of(found: Trace) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(page(found, SETTINGS))
    return console.export_text()


def record_many(log: Log, num: int) -> list[str]:
    ids = []
    for number in range(num):
        pair = record_request(log, number)
        assert pair is not None
        record_step(log, pair, step=number)
        ids.append(pair.pair_id)
    return ids


def test_a_pair_is_followed_back_to_its_prompt_and_on_to_its_step(log: Log) -> None:
    ids = record_many(log, 20)
    found = one(log, ids[7])
    assert found.request.number == 7
    assert found.asked is not None and found.asked.record == found.request
    assert found.group is not None and found.group.record.request == found.request
    assert found.scored is not None and found.scored.record.group == found.group.record
    assert found.pair is not None and found.pair.record.pair_id == ids[7]
    assert [one.record.ending for one in found.feedback] == ["consumed", "trained"]
    assert found.step is not None and (found.step.step, found.step.loss) == (7, 0.5)


@pytest.mark.parametrize("digits", [6, 16])
def test_the_beginning_of_an_id_suffices_where_it_is_unique(log: Log, digits: int) -> None:
    ids = record_many(log, 8)
    assert one(log, ids[3][:digits]).request.number == 3
    assert one(log, make_prompt(5).group_id[:digits]).request.number == 5


def test_a_request_is_found_by_its_number_wherever_it_was_issued(log: Log) -> None:
    """A number that was lost on the way is issued behind later ones; a copy of a scheduler with an heir is none."""
    record_many(log, 8)
    fence = fence_at_the_end(log, "prompts", 5)
    append(log, "roles", "scheduler-0/2", make_role("scheduler", epoch=2, fences=[fence]))
    for prompt_id, claim in (("zombie", 4), ("late", 5)):
        append(log, "prompts", "p", make_prompt(9, prompt_id=prompt_id, claim=claim))
        append(log, "prompts", "p", make_prompt(20, claim=claim))
        append(log, "prompts", "p", make_prompt(8, prompt_id=prompt_id, claim=claim))
    assert [one(log, number).request.prompt_id for number in ("8", "9", "3")] == ["late", "late", "p3"]


def test_a_prefix_of_several_ids_is_refused_with_their_names(log: Log) -> None:
    ids = record_many(log, 3)
    with pytest.raises(ConfigError, match=f"3 pairs begin with '': {sorted(ids)[0]}"):
        trace(log, ["policy"], "")


def test_an_id_that_nobody_has_is_refused(log: Log) -> None:
    record_many(log, 1)
    with pytest.raises(ConfigError, match="no pair, group or request 'ffff' is in the log"):
        trace(log, ["policy"], "ffff")


def test_a_request_is_found_by_its_number(log: Log) -> None:
    ids = record_many(log, 30)
    found = one(log, "17")
    assert found.pair is not None and found.pair.record.pair_id == ids[17]


def test_a_request_that_became_no_pair_tells_why(log: Log) -> None:
    record_request(log, 0, [1.0, 1.0])
    found = one(log, "0")
    assert found.pair is None
    assert found.ending is not None and (found.ending.ending, found.ending.reason) == ("dropped", "no_spread")
    assert "dropped by the selector: no_spread" in text_of(found)


def test_a_request_on_its_way_shows_how_far_it_came(log: Log) -> None:
    append(log, topics.PROMPTS.name, "p0", make_prompt(0))
    found = one(log, "0")
    assert (found.ending, found.group, found.scored) == (None, None, None)
    assert "on its way, last seen in asked" in text_of(found)


def test_a_pair_whose_step_is_not_durable_yet_says_so(log: Log) -> None:
    pair = record_request(log)
    assert pair is not None
    record_step(log, pair, step=4, is_durable=False)
    assert "in step 4 of epoch 1, whose checkpoint is not durable yet" in text_of(one(log, pair.pair_id))


def test_what_is_past_retention_is_named_and_the_rest_is_shown(log: Log) -> None:
    pair = record_request(log)
    assert pair is not None
    record_step(log, pair)
    for topic in ("prompts", "candidates", "scored"):
        log.trim(log.end_offsets(topic))
    found = one(log, pair.pair_id)
    assert (found.asked, found.group, found.scored) == (None, None, None)
    assert found.request.number == 0
    text = text_of(found)
    assert "past retention" in text
    assert "trained in epoch 1, step 1" in text


def test_of_two_contents_of_one_request_the_trained_one_is_shown(log: Log) -> None:
    """A request sampled again after a crash gives a second pair of the same id."""
    first = record_request(log, texts=["a", "b"])
    assert first is not None
    second = record_request(log, texts=["c", "d"])
    assert second is not None and second.pair_id == first.pair_id
    record_step(log, first)
    found = one(log, first.pair_id)
    assert found.pair is not None and found.pair.record.chosen.text == "a"
    assert found.scored is not None and found.scored.record.group.content_hash == first.content_hash


def test_what_a_replaced_learner_says_is_not_shown(log: Log) -> None:
    pair = record_request(log)
    assert pair is not None
    ends = [(partition, offset) for (_, partition), offset in log.end_offsets("feedback").items()]
    append(log, "weights", "policy/full", make_weights(Version(2, 0), fences=[Fence(epoch=2, ends=ends)]))
    record_step(log, pair)
    assert one(log, pair.pair_id).ending is None


def test_bytes_that_are_no_record_are_passed_over(log: Log) -> None:
    log.append([Output(topic, b"k", b"junk") for topic in ("prompts", "feedback", "pairs.policy", "candidates")])
    ids = record_many(log, 3)
    assert one(log, ids[2]).ending is not None
    assert one(log, "2").request.number == 2


def test_the_page_answers_the_question(log: Log) -> None:
    request = make_prompt(0, messages=[Message(role="user", content="What is [bold]1+1?")], text=None, golden="two")
    spans = [Span(version=Version(1, 3), start=0, end=4), Span(version=Version(1, 4), start=4, end=7)]
    candidates = [make_candidate("2", spans=spans), make_candidate("three")]
    source = append(log, "prompts", "p0", request)
    group = make_group(request=request, candidates=candidates, source=source)
    source = append(log, "candidates", group.group_id, group)
    rewards = [make_rewards([1.0, 0.0], source="exact"), make_rewards([None, None], source="judge", weight=0.5)]
    scored = msgspec.structs.replace(make_scored(group=group, source=source), rewards=rewards)
    pair = record_selection(log, (scored, append(log, "scored", group.group_id, scored)), SETTINGS)
    assert pair is not None
    record_step(log, pair, step=12, chosen_logprob=-3.5, staleness=2)
    text = text_of(one(log, pair.pair_id))
    for expected in (
        "trained in epoch 1, step 12", "loss 0.5", "log pi(chosen) -3.5", "staleness 2", "candidate 0 over 1",
        "external 1", "rule=max_min", "exact", "judge x0.5", "test", "0-4 by 1.3, 4-7 by 1.4", "2",
        "user: What is [bold]1+1?", "golden: two", "scored/", "reference",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_json_holds_every_record(log: Log) -> None:
    ids = record_many(log, 2)
    found = json.loads(json.dumps(as_json(one(log, ids[1]))))
    assert (found["pair_id"], found["ending"], found["step"]) == (ids[1], "trained", 1)
    assert [hop["hop"] for hop in found["way"][:4]] == ["asked", "sampled", "scored", "paired"]
    assert found["scored"]["group"]["candidates"][0]["tokens"]
