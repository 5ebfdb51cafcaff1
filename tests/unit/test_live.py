import io

import pytest

from deploy.live import PlainView, Progress, clock, eta, headline
from deploy.status import Status, figures, health_of, shares, short
from streaming.evaluation import Measurement
from streaming.records import Version
from tests.builders import make_role


def progress(*roles, **fields) -> Progress:
    measured = Measurement(1, Version(1, 8), 0.7512, 2, 2, True)
    defaults = {"elapsed_s": 61.0, "eta_s": 3700.0, "best": measured, "newest": measured}
    return Progress(name="mine", status=Status(list(roles), {}, 100.0), **{**defaults, **fields})


def test_the_headline_says_where_the_run_stands():
    learner = make_role("learner", numbers={"step": 40.0, "staleness": 1.25})
    line = headline(progress(learner))
    assert line == "01:01  step 40  staleness 1.25  held-out 0.751 (version 1.8)  best 0.751 (1.8)  eta 1:01:40"


def test_the_headline_leaves_out_what_nobody_knows_yet():
    assert headline(progress(eta_s=None, best=None, newest=None)) == "01:01"


def test_events_are_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    view = PlainView(stream)
    view.event("scorer-0 failed")
    view.update(progress())
    assert stream.getvalue() == "scorer-0 failed\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.6, "01:00"), (3600, "1:00:00"), (-3, "00:00")])
def test_times_are_read_as_clocks(seconds, text):
    assert clock(seconds) == text


def test_the_first_limit_to_pass_gives_the_time_that_is_left():
    assert eta({"steps": (0.0, 0.5), "data": (0.0, 0.1)}, 60.0) == 60.0
    assert eta({}, 60.0) is None


def test_a_resumed_run_is_timed_from_where_it_began():
    assert eta({"steps": (0.5, 0.6)}, 10.0) == pytest.approx(40.0)
    assert eta({"steps": (0.5, 0.5)}, 10.0) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.0, "3"), (0.12345, "0.123"), (1234.5, "1,234"), (float("nan"), "nan"), (float("inf"), "inf")],
)
def test_figures_are_short(value, text):
    assert short(value) == text


def test_figures_stand_on_one_line():
    assert figures(make_role(numbers={"loss": 0.5, "other": 1.0, "step": 2.0})) == "step 2  loss 0.5"


def test_a_role_that_has_been_silent_is_not_called_ready():
    role = make_role(time_s=100.0, health="ready")
    assert health_of(role, 105.0) == "ready"
    assert health_of(role, 160.0) == "silent 60 s"
    assert health_of(make_role(time_s=100.0, health="stopped"), 160.0) == "stopped"


def test_idle_shares_are_those_since_the_earlier_beat():
    earlier = make_role(epoch=1, seconds={"busy": 10.0, "waiting": 10.0})
    now = make_role(epoch=1, seconds={"busy": 11.0, "waiting": 13.0})
    assert shares(earlier, now) == {"busy": 0.25, "waiting": 0.75}


def test_a_restarted_role_counts_from_its_new_start():
    earlier = make_role(epoch=1, seconds={"busy": 100.0})
    assert shares(earlier, make_role(epoch=2, seconds={"busy": 1.0, "waiting": 1.0})) == {"busy": 0.5, "waiting": 0.5}
    assert shares(None, make_role(seconds={})) == {}
