import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deploy.config import RunConfig
from deploy.replay import Outcome, Replayed, replay
from deploy.replay_page import as_json, page
from deploy.tiny_model import save_tiny_model
from streaming import topics
from streaming.config import SelectionConfig
from streaming.log.protocol import Log, Output
from tests.builders import make_config
from tests.recorded import SETTINGS, record_request, record_scored, record_selection

LENGTHS = "def score(completions, **rest):\n    return [float(len(text)) for text in completions]\n"


def config(folder: Path, *, reward: str = LENGTHS, selection: SelectionConfig = SETTINGS, **changed: Any) -> RunConfig:
    (folder / "reward.py").write_text(reward)
    rewards = [{"name": "reward", "function": f"{folder}/reward.py:score"}]
    return make_config(folder, rewards=rewards, selection=selection.model_dump(), **changed)


def again(
    log: Log, tried: RunConfig, start: Any = "scored", *, recorded: RunConfig | None = None, **rest: Any
) -> Replayed:
    return replay(log, tried, tried.every_policy[0], recorded or tried, start, rest.get("limit"))


def kinds(found: Replayed) -> dict[int, str]:
    return {one.request_number: one.kind for one in found.changes}


def test_the_same_settings_give_what_happened(log: Log, tmp_path: Path) -> None:
    for number, rewards in enumerate([(1.0, 0.0), (1.0, 1.0), (None, None), (0.5, 0.2, 0.9)]):
        record_request(log, number, rewards)
    found = again(log, config(tmp_path))
    assert (found.num_groups, found.num_waiting, found.changes) == (4, 0, [])
    assert sorted(found.before) == sorted(found.after)
    assert found.counts(found.after) == {("dpo", ""): 2, ("drop", "no_spread"): 1, ("drop", "reward_missing"): 1}


def test_pairs_disappear_appear_and_change_their_roles(log: Log, tmp_path: Path) -> None:
    strict = SelectionConfig(rule="max_min", min_margin=0.5)
    record_request(log, 0, (1.0, 0.8))
    record_request(log, 1, (1.0, 0.8), settings=strict)
    record_request(log, 2, (1.0, 0.5, 0.0))
    record_request(log, 3, (1.0, 1.0))
    assert kinds(again(log, config(tmp_path, selection=strict))) == {0: "disappears"}
    assert kinds(again(log, config(tmp_path))) == {1: "appears"}
    median = SelectionConfig(rule="quantile", quantile=0.5, sft_floor=0.9)
    found = again(log, config(tmp_path, selection=median))
    assert kinds(found) == {1: "appears", 2: "other roles", 3: "appears"}
    [roles] = [one for one in found.changes if one.request_number == 2]
    assert (roles.before, roles.after) == (
        Outcome("dpo", "", 0, 2, 1.0, None),
        Outcome("dpo", "", 0, 1, 0.5, None),
    )


def test_what_is_not_selected_yet_is_counted_and_not_compared(log: Log, tmp_path: Path) -> None:
    record_request(log, 0)
    record_scored(log, 1, (1.0, 0.0))
    found = again(log, config(tmp_path))
    assert (found.num_groups, found.num_waiting, len(found.before)) == (2, 1, 1)


def test_of_two_samplings_of_a_request_the_first_is_replayed(log: Log, tmp_path: Path) -> None:
    record_request(log, 0, (1.0, 0.0))
    record_scored(log, 0, (0.0, 1.0), texts=["c", "d"])
    found = again(log, config(tmp_path))
    assert (found.num_groups, found.changes) == (1, [])


def test_only_the_newest_groups_are_replayed_where_there_is_a_limit(log: Log, tmp_path: Path) -> None:
    for number in range(10):
        record_request(log, number)
    assert again(log, config(tmp_path), limit=3).num_groups == 3


def test_rewards_are_asked_again_and_the_reference_stays_as_recorded(log: Log, tmp_path: Path) -> None:
    record_request(log, 0, (0.0, 1.0), texts=["long one", "short"])
    record_request(log, 1, (1.0, 0.0), texts=["long one", "short"])
    found = again(log, config(tmp_path), "candidates")
    assert kinds(found) == {0: "other roles"}
    assert found.rewards_before["reward"].mean == 0.5
    assert found.rewards_after["reward"].mean == 6.5
    assert found.changes[0].after.external == 3.0


def test_a_reward_that_fails_is_missing_as_it_would_be(log: Log, tmp_path: Path) -> None:
    record_request(log, 0)
    found = again(log, config(tmp_path, reward="def score(completions, **rest):\n    return [1 / 0]\n"), "candidates")
    assert found.after == [Outcome("drop", "reward_missing")]
    assert found.rewards_after["reward"].num_missing == 2


def test_another_reference_prices_the_groups_again(log: Log, tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model", chat_template=False))
    record_request(log, 0, texts=["long one", "short"])
    recorded = config(tmp_path)
    tried = config(tmp_path, scoring={"reference": model, "num_threads": 1})
    [before] = again(log, recorded, "candidates").after
    [after] = again(log, tried, "candidates", recorded=recorded).after
    assert before.implicit is None, "the builders' group has no implicit reward on record"
    assert after.implicit is not None


def test_a_replay_writes_nothing(log: Log, tmp_path: Path) -> None:
    record_request(log, 0)
    names = [topic.name for topic in topics.all_topics("policy")]
    before = [log.end_offsets(name) for name in names]
    again(log, config(tmp_path), "candidates")
    assert [log.end_offsets(name) for name in names] == before


def test_bytes_that_are_no_record_are_passed_over(log: Log, tmp_path: Path) -> None:
    log.append([Output(topic, b"k", b"junk") for topic in ("scored", "feedback", "pairs.policy")])
    record_request(log, 0)
    assert again(log, config(tmp_path)).num_groups == 1


@pytest.mark.parametrize("rewards", [[], [(1.0, 0.8), (1.0, 1.0)]])
def test_the_page_and_the_json_say_the_same(log: Log, tmp_path: Path, rewards: list[tuple[float, float]]) -> None:
    for number, two in enumerate(rewards):
        record_selection(log, record_scored(log, number, two), SETTINGS)
    found = again(log, config(tmp_path, selection=SelectionConfig(rule="max_min", min_margin=0.5)))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(page(found))
    text = console.export_text()
    said = json.loads(json.dumps(as_json(found)))
    if rewards:
        assert "2 groups compared; disappears: 1" in text
        assert "drop: small_margin" in text
        assert said["kinds"] == {"disappears": 1}
        assert {"route": "dpo", "reason": "", "before": 1, "after": 0} in said["routes"]
        assert said["margins"]["external"] == {"before": [pytest.approx(0.2)] * 7, "after": None}
    else:
        assert "0 groups compared; every group comes out the same" in text
