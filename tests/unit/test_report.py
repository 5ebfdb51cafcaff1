"""The page about a run: everything on it comes from a record, nothing on it can harm, and an empty run has one too."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.config import RunConfig, load_run, run_directory, save_config
from deploy.plots import NUM_BARS, Ink, bars
from deploy.report import condition, duration, figure, gather, in_order, render, write_report
from deploy.roles import open_run_log
from deploy.summary import Histogram
from streaming import topics
from streaming.errors import ConfigError
from streaming.log.protocol import Log, Output
from streaming.records import Feedback, Margins, Pair, Record, RoleState, ScoredGroup, Span, Version, encode
from tests.builders import (
    make_feedback,
    make_group,
    make_pair,
    make_response,
    make_role,
    make_scored,
    make_weights,
)

NOW = 1_700_000_000.0
TOPIC_OF = {ScoredGroup: "scored", Pair: "pairs.policy", Feedback: "feedback", RoleState: "roles"}


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run that has not begun."""
    return make_run(tmp_path)


@pytest.fixture
def log(run: RunConfig) -> Iterator[Log]:
    with open_run_log(run) as opened:
        yield opened


def make_run(directory: Path, **fields: object) -> RunConfig:
    values = {
        "name": "sums",
        "model": "base-model",
        "prompts": {"path": "train.jsonl", "eval_path": "heldout.jsonl"},
        "rewards": [{"name": "correct", "function": "rules:correct"}],
        "directory": str(directory),
        **fields,
    }
    save_config(RunConfig.model_validate(values), directory / "config.yaml")
    return load_run(directory)


def put(log: Log, *records: Record) -> None:
    """Append records to their topics."""
    log.append([Output(TOPIC_OF.get(type(one), "weights"), key_of(one), encode(one)) for one in records])


def key_of(record: Record) -> bytes:
    return (record.role_id if isinstance(record, RoleState) else "key").encode()


def page_of(run: RunConfig, *records: Record) -> str:
    """The page about a run whose log holds these records."""
    with open_run_log(run) as log:
        put(log, *records)
        return page(run, log)


def page(run: RunConfig, log: Log) -> str:
    return render(run, gather(log, "policy"), now=NOW)


def consumed(**fields: object) -> Feedback:
    defaults = {"epoch": 1, "step": 1, "route": "dpo", "stage": "learner"}
    return make_feedback(ending="consumed", **{**defaults, **fields})


def evaluated(number: int = 0, **fields: object) -> Feedback:
    defaults = {"round": 0, "round_size": 1, "mean_reward": 0.512, "version": Version(1, 0), "stage": "scorer"}
    return make_feedback(number, ending="evaluated", **{**defaults, **fields})


def rewarded(reward: float) -> Pair:
    """An example whose chosen response got this reward, and spans an update."""
    spans = [Span(version=Version(1, 0), start=0, end=1), Span(version=Version(1, 1), start=1, end=2)]
    return msgspec.structs.replace(make_pair(), chosen=make_response("2", reward=reward, spans=spans))


def test_a_run_that_has_not_begun_gets_a_page_that_says_so(run: RunConfig) -> None:
    path = write_report(run_directory(run))
    text = path.read_text()
    assert path.name == "report.html" and "sums" in text and "not started" in text
    for missing in ("No held-out measurement is complete yet", "No pair has been made yet", "No role has started yet"):
        assert missing in text
    assert "<svg" not in text


def test_a_run_without_held_out_prompts_is_not_told_to_wait_for_them(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path, prompts={"path": "train.jsonl"}))
    assert "prompts.eval_path is not set" in text


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        (evaluated(), "0.512"),
        (make_scored([0.375, 0.125]), "Mean training reward by weight version"),
        (make_scored([0.375, 0.125]), "0.250"),
        (make_pair(margins=Margins(external=0.1875)), "external margin 0.188"),
        (make_pair(margins=Margins(implicit=-2.5)), "implicit margin \N{MINUS SIGN}2.500 nats"),
        (make_pair(chosen="47", rejected="11"), "<pre>47</pre>"),
        (make_pair(rejected=None), "1 SFT example"),
        (rewarded(0.625), "reward 0.625"),
        (rewarded(0.625), "versions 1.0 (tokens 0 to 0), 1.1 (tokens 1 to 1)"),
        (make_pair(), "0+1="),
        (consumed(staleness=3), "Staleness of the examples"),
        (consumed(chosen_logprob=-1.0, rejected_logprob=-2.0), "Log-probs of chosen and rejected by learner step"),
        (consumed(loss=0.5), "Loss by learner step"),
        (make_feedback(ending="dropped", stage="selector", reason="no_spread"), "no_spread"),
        (make_feedback(ending="dead_lettered", stage="scorer"), "dead_lettered"),
        (make_role("generator", index=7, seconds={"busy": 1.0, "waiting": 3.0}, message="hello"), "generator-7"),
        (make_role("generator", seconds={"busy": 1.0, "waiting": 3.0}), "75%"),
        (make_weights(Version(2, 41), step=41), "2.41, after 41 steps"),
    ],
)
def test_every_figure_comes_from_a_record(run: RunConfig, record: Record, shown: str) -> None:
    assert shown not in page_of(run)
    assert shown in page_of(run, record)


CHANGES = {
    "held-out reward": (evaluated(mean_reward=0.25), evaluated(mean_reward=0.75)),
    "who sampled the held-out answers": (evaluated(version=Version(1, 1)), evaluated(version=Version(1, 2))),
    "training reward": (make_scored([0.0, 1.0]), make_scored([0.5, 1.0])),
    "sampling version": (
        make_scored(group=make_group(version=Version(1, 1))),
        make_scored(group=make_group(version=Version(1, 2))),
    ),
    "external margin": (make_pair(margins=Margins(external=1.0)), make_pair(margins=Margins(external=2.0))),
    "implicit margin": (make_pair(margins=Margins(implicit=1.0)), make_pair(margins=Margins(implicit=2.0))),
    "staleness": (consumed(staleness=1), consumed(staleness=2)),
    "whether a stale example was dropped": (consumed(staleness=1), consumed(staleness=1, reason="stale")),
    "loss": (consumed(loss=0.1), consumed(loss=0.2)),
    "step": (consumed(loss=0.1, step=1), consumed(loss=0.1, step=2)),
    "chosen log-prob": (
        consumed(chosen_logprob=-1.0, rejected_logprob=-5.0),
        consumed(chosen_logprob=-2.0, rejected_logprob=-5.0),
    ),
    "rejected log-prob": (
        consumed(chosen_logprob=-1.0, rejected_logprob=-5.0),
        consumed(chosen_logprob=-1.0, rejected_logprob=-6.0),
    ),
    "idle time": (make_role(seconds={"busy": 1.0, "blocked": 1.0}), make_role(seconds={"busy": 1.0, "updating": 1.0})),
    "reason": (make_feedback(ending="dropped", reason="tie"), make_feedback(ending="dropped", reason="empty")),
    "reward of an example": (rewarded(0.25), rewarded(0.5)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_record_makes_another_page(tmp_path: Path, change: str) -> None:
    texts = []
    for name, record in zip("ab", CHANGES[change], strict=True):
        directory = tmp_path / name
        directory.mkdir()
        texts.append(without_times(page_of(make_run(directory), record)))
    assert texts[0] != texts[1]


def test_the_same_records_make_the_same_page(tmp_path: Path) -> None:
    texts = []
    for name in "ab":
        (tmp_path / name).mkdir()
        records = [first for first, _ in CHANGES.values()]
        texts.append(without_times(page_of(make_run(tmp_path / name), *records)))
    assert texts[0] == texts[1]


def without_times(text: str) -> str:
    """The page without when it was made, which differs between two logs that hold the same."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC|<dt>First to last record</dt>\s*<dd>.*?</dd>", "", text)


def test_before_is_the_first_measurement_after_the_last_and_best_the_highest(run: RunConfig) -> None:
    rewards = {0: 0.2, 1: 0.9, 2: 0.7}
    text = page_of(
        run, *(evaluated(n, round=n, mean_reward=reward, version=Version(1, n)) for n, reward in rewards.items())
    )
    headline = text[text.index('<dl class="headline">') : text.index('<dl class="facts">')]
    assert re.findall(r"<dd>([\d.]+)", headline) == ["0.200", "0.700", "0.900"]
    assert re.findall(r"(\d+) prompt, version ([\d.]+)", headline) == [("1", "1.0"), ("1", "1.2"), ("1", "1.1")]


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> & \"'$\\frac$ {{ 7*7 }}"


def test_text_of_the_run_is_shown_as_text(tmp_path: Path) -> None:
    hostile = msgspec.structs.replace(make_response(), text=HOSTILE)
    text = page_of(
        make_run(tmp_path, model=HOSTILE),
        msgspec.structs.replace(make_pair(prompt_text=HOSTILE), chosen=hostile),
        make_feedback(ending="dropped", stage=HOSTILE, reason=HOSTILE),
        make_role(HOSTILE, seconds={"busy": 1.0}, message=HOSTILE),
        make_weights(location=HOSTILE),
    )
    assert "<script" not in text and "<img" not in text and "{{ 7*7 }}" in text
    # Model, prompt, chosen, stage, reason, role in its table and on its axis, message, directory.
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 9


def everything() -> list[Record]:
    """At least one record for every plot and table."""
    return [
        *(record for both in CHANGES.values() for record in both),
        make_weights(),
    ]


class Page(HTMLParser):
    """What a page refers to, its ids, and its elements that are open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.references.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_runs_nothing(run: RunConfig) -> None:
    text = page_of(run, *everything())
    parsed = Page(text)
    assert parsed.open == [], "every element is closed"
    assert {"script", "link", "img", "iframe", "object"}.isdisjoint(parsed.tags)
    assert all(reference.startswith("#") for reference in parsed.references)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert len(parsed.ids) == len(set(parsed.ids)), "plots share no id"
    assert {reference[1:] for reference in parsed.references} <= set(parsed.ids)


def test_the_plots_take_their_colours_and_their_font_from_the_page(run: RunConfig) -> None:
    text = page_of(run, *everything())
    plots = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert text.count("<svg") == 8
    assert not any(ink.value in text for ink in Ink)
    assert "font-family" not in plots
    assert re.findall(r"(?:fill|stroke): (?!none|var\(--)[^;\"]+", plots) == []


def test_a_run_in_progress_gets_a_page_that_grows_and_is_not_disturbed(run: RunConfig, log: Log) -> None:
    directory = run_directory(run)
    put(log, make_pair(0))
    first = write_report(directory).read_text()
    with log.subscribe("learner", ["pairs.policy"]) as consumer:
        consumer.commit({place: offset + 1 for place, offset in log.begin_offsets("pairs.policy").items()})
        before = (log.end_offsets("pairs.policy"), log.committed("learner", ["pairs.policy"]))
        put(log, make_pair(1))
        second = write_report(directory).read_text()
        assert log.committed("learner", ["pairs.policy"]) == before[1]
    assert "1 DPO pair," in first and "2 DPO pairs" in second
    assert {path.name for path in directory.iterdir() if "html" in path.name} == {"report.html"}


def test_bytes_that_are_no_record_are_left_out_and_counted(run: RunConfig, log: Log) -> None:
    log.append([Output("feedback", b"key", b"\xff")])
    put(log, make_feedback(ending="trained"))
    text = page(run, log)
    assert "Left out of topic feedback: 1 unreadable record." in text and "<td>trained</td>" in text


def test_records_past_retention_are_said_to_be_missing(run: RunConfig, log: Log) -> None:
    put(log, make_pair(0), make_pair(1))
    log.trim({place: 1 for place, end in log.end_offsets("pairs.policy").items() if end})
    assert "Retention has taken 1 record from the start of topic pairs.policy" in page(run, log)


def test_only_the_ends_of_a_long_text_are_cut(run: RunConfig) -> None:
    text = page_of(run, make_pair(prompt_text="x" * 5000))
    assert "x" * 4000 + " [... 1,000 more characters]" in text


def test_roles_stand_in_the_order_in_which_a_prompt_meets_them() -> None:
    states = [make_role(role, index=index) for role, index in (("learner", 0), ("generator", 10), ("generator", 9))]
    states.append(make_role("scheduler"))
    assert [state.role_id for state in in_order(states)] == ["scheduler-0", "generator-9", "generator-10", "learner-0"]


BEATING = make_role("learner", time_s=NOW - 1)
STOPPED = make_role("scorer", time_s=NOW - 99, health="stopped")
STOPPED_NOW = make_role("scorer", time_s=NOW - 1, health="stopped")


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], "not started"),
        ([BEATING, STOPPED], "in progress"),
        ([STOPPED], "over"),
        ([STOPPED, make_role(time_s=NOW - 60)], "interrupted, last sign of life 2023-11-14 22:12:20 UTC"),
        ([STOPPED_NOW, make_role(time_s=NOW - 60)], "interrupted, last sign of life 2023-11-14 22:13:19 UTC"),
        ([BEATING, make_role("generator", health="failed", message="no memory")], "failed: generator-0 (no memory)"),
    ],
)
def test_the_condition_of_a_run_follows_from_its_beats(states: list[RoleState], expected: str) -> None:
    assert condition(states, NOW) == expected


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300))
def test_the_bars_of_a_histogram_hold_every_value(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    centres, counts, width = bars(histogram)
    assert sum(counts) == len(values)
    assert len(centres) <= NUM_BARS and width > 0


def test_a_few_far_values_do_not_squeeze_the_others_together() -> None:
    histogram = Histogram()
    for value in [*range(1000), 10**6]:
        histogram.add(value)
    centres, counts, _ = bars(histogram)
    assert max(centres) < 1100
    assert sum(counts) == 1001


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (90061, "1 d 1 h")],
)
def test_a_duration_is_told_in_its_largest_units(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_a_missing_number_is_no_zero() -> None:
    assert figure(None) == "\N{EN DASH}"
    assert figure(-0.5) == "\N{MINUS SIGN}0.500"


def test_topics_read_are_topics_that_exist() -> None:
    assert set(TOPIC_OF.values()) <= {topic.name for topic in topics.all_topics("policy")}
