"""The scheduler over the real embedded log. The test plays the other roles: it appends what they would."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.config import PromptsConfig, SamplingConfig, SchedulerConfig
from actors.issuer import Issuer
from actors.prompts import Prompt
from actors.scheduler import Prompts, Scheduler
from streaming import topics
from streaming.audit import audit_log
from streaming.books import carry
from streaming.errors import LogError, SupersededError
from streaming.fencing import read_issuers
from streaming.heartbeat import NO_HISTORY, Beats, Heartbeat, beats, role_states
from streaming.history import entries
from streaming.log import open_log
from streaming.log.protocol import Log, Output
from streaming.metrics import Metrics
from streaming.readable import readable
from streaming.records import (
    DeadLetter,
    Feedback,
    Fence,
    PromptRequest,
    Record,
    RoleState,
    Version,
    WeightVersion,
    decode,
    encode,
)
from tests.builders import broken, make_feedback, make_prompt, make_role, make_weights
from tests.fakes import CrashingLog

TRAIN = [Prompt(prompt_id=f"t{i}", text=f"{i}+1=", golden=str(i + 1), columns={"answer": i + 1}) for i in range(4)]
HELD_OUT = [Prompt(prompt_id=f"h{i}", text=f"{i}+2=", columns={"answer": i + 2}) for i in range(2)]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with open_log(f"sqlite:///{tmp_path}/log.db", run="test") as opened:
        yield opened


def make_scheduler(log: Log, heartbeat: Heartbeat, *, held_out: list[Prompt], history: Beats, **changed) -> Scheduler:
    """Settings by name, whatever section they are in."""
    prompts = {"path": "-", "shuffle_seed": None}
    prompts |= {name: changed.pop(name) for name in list(changed) if name in PromptsConfig.model_fields}
    return Scheduler(
        log,
        Metrics("scheduler"),
        heartbeat,
        Issuer(log, heartbeat),
        prompts=Prompts(TRAIN, held_out),
        config=SchedulerConfig(**{"pipeline_depth": 3, **changed}),
        prompts_config=PromptsConfig(**prompts),
        sampling=SamplingConfig(num_candidates=2, temperature=0.5, stop=["\n"]),
        policy="policy",
        history=history,
    )


@contextmanager
def scheduling(
    log: Log, *, held_out: list[Prompt] | None = None, history: Beats = NO_HISTORY, **changed
) -> Iterator[threading.Thread]:
    """A scheduler at work in a thread; stopped on the way out."""
    heartbeat = Heartbeat(log, Metrics("scheduler"), role="scheduler", interval_s=0.02)
    scheduler = make_scheduler(log, heartbeat, held_out=held_out or [], history=history, **changed)
    stop = threading.Event()
    thread = threading.Thread(target=scheduler.run, args=(stop,))
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join()
        heartbeat.close(message=heartbeat.state.message)


def append(log: Log, topic: str, key: str, *records: Record) -> None:
    log.append([Output(topic, key.encode(), encode(record)) for record in records])


def end(log: Log, *feedback: Feedback) -> None:
    append(log, topics.FEEDBACK.name, "group", *feedback)


def publish(log: Log, *weights: WeightVersion) -> None:
    append(log, topics.WEIGHTS.name, "policy/full", *weights)


def issued(log: Log) -> list[PromptRequest]:
    requests = readable(PromptRequest, entries(log, topics.PROMPTS.name))
    return sorted(requests, key=lambda request: request.number)


def until(holds: Callable[[], bool]) -> None:
    """Wait for another thread's work; a promise that is never kept fails here."""
    limit_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit_s, "did not happen within a minute"
        threading.Event().wait(0.005)


def state(log: Log) -> RoleState:
    return role_states(log)["scheduler-0"]


def test_it_issues_as_many_requests_as_the_pipeline_is_deep_and_no_more(log):
    with scheduling(log):
        until(lambda: state(log).numbers.get("outstanding") == 3)
    assert [r.number for r in issued(log)] == [0, 1, 2]


def test_a_request_carries_the_prompt_its_columns_and_the_sampling(log):
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
    request = issued(log)[1]
    assert (request.prompt_id, request.text, request.golden, request.columns) == ("t1", "1+1=", "2", {"answer": 2})
    assert (request.num_candidates, request.sampling.temperature, request.sampling.stop) == (2, 0.5, ["\n"])


@pytest.mark.parametrize("ending", ["consumed", "dropped", "dead_lettered"])
def test_an_ending_at_any_stage_brings_the_next_request(log, ending):
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
        end(log, make_feedback(1, ending=ending))
        until(lambda: len(issued(log)) == 4)
    assert issued(log)[3].prompt_id == "t3"


def test_it_cycles_through_the_prompts(log):
    with scheduling(log, pipeline_depth=10):
        until(lambda: len(issued(log)) == 10)
    assert [r.prompt_id for r in issued(log)] == ["t0", "t1", "t2", "t3"] * 2 + ["t0", "t1"]


def test_a_restart_goes_on_with_the_next_number_and_prompt_and_knows_what_is_outstanding(log):
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
    end(log, make_feedback(0, ending="consumed"))
    with scheduling(log):
        until(lambda: len(issued(log)) == 4)
        until(lambda: state(log).numbers.get("outstanding") == 3)
    assert [(r.number, r.prompt_id) for r in issued(log)][3:] == [(3, "t3")]


def test_evaluation_does_not_shift_the_order_of_training_prompts(log):
    publish(log, make_weights(Version(1, 0)))
    with scheduling(log, held_out=HELD_OUT, pipeline_depth=2):
        until(lambda: len(issued(log)) == 4)
        end(log, *(make_feedback(r.number) for r in issued(log) if r.purpose == "train"))
        until(lambda: len(issued(log)) == 6)
    train = [r for r in issued(log) if r.purpose == "train"]
    assert [(r.ordinal, r.prompt_id) for r in train] == [(i, f"t{i}") for i in range(4)]


def test_the_first_published_version_is_measured_with_one_plain_sample_per_held_out_prompt(log):
    with scheduling(log, held_out=HELD_OUT):
        until(lambda: len(issued(log)) == 3)
        publish(log, make_weights(Version(1, 0)))
        until(lambda: len(issued(log)) == 5)
    evals = [r for r in issued(log) if r.purpose == "eval"]
    assert [r.prompt_id for r in evals] == ["h0", "h1"]
    assert {(r.round, r.round_size, r.min_version) for r in evals} == {(0, 2, Version(1, 0))}
    assert {(r.num_candidates, r.sampling.temperature, r.sampling.top_p) for r in evals} == {(1, 1.0, 1.0)}
    assert evals[0].sampling.stop == ["\n"]


def evaluate(log: Log, version: Version, reward: float) -> None:
    """Play generator and scorer for the newest round."""
    last = max(r.round for r in issued(log) if r.round is not None)
    end(
        log,
        *(
            make_feedback(
                r.number, ending="evaluated", round=r.round, round_size=2, version=version, mean_reward=reward
            )
            for r in issued(log)
            if r.round == last
        ),
    )


def test_a_measurement_is_told_and_its_version_leased_while_it_is_the_best(log):
    publish(log, make_weights(Version(1, 0)))
    with scheduling(log, held_out=HELD_OUT):
        until(lambda: len(issued(log)) == 5)
        assert state(log).leases == [Version(1, 0)]
        evaluate(log, Version(1, 0), 0.75)
        until(lambda: state(log).numbers.get("heldout_reward") == 0.75)
        publish(log, make_weights(Version(1, 5)))
        until(lambda: state(log).leases == [Version(1, 0)])


def test_a_version_published_during_a_round_is_leased_before_the_scheduler_does_anything_else(log):
    publish(log, make_weights(Version(1, 0)))
    with scheduling(log, held_out=HELD_OUT):
        until(lambda: len(issued(log)) == 5)
        publish(log, make_weights(Version(1, 1)))
        until(lambda: state(log).leases == [Version(1, 0), Version(1, 1)])


def test_the_next_round_is_due_after_eval_every_versions(log):
    publish(log, make_weights(Version(1, 0)))
    with scheduling(log, held_out=HELD_OUT, eval_every=2):
        until(lambda: len(issued(log)) == 5)
        evaluate(log, Version(1, 0), 0.5)
        publish(log, make_weights(Version(1, 1)), make_weights(Version(1, 2)))
        until(lambda: len(issued(log)) == 7)
    assert issued(log)[-1].min_version == Version(1, 2)


def test_when_the_learner_has_stopped_the_last_version_is_measured_and_the_scheduler_is_over(log):
    publish(log, make_weights(Version(1, 0)))
    with scheduling(log, held_out=HELD_OUT) as thread:
        until(lambda: len(issued(log)) == 5)
        evaluate(log, Version(1, 0), 0.5)
        publish(log, make_weights(Version(1, 1)))
        append(log, topics.ROLES.name, "learner-0", make_role(health="stopped", message="max_steps", time_s=1.0))
        until(lambda: len(issued(log)) == 7)
        end(log, *(make_feedback(r.number) for r in issued(log) if r.purpose == "train"))
        until(lambda: state(log).numbers["outstanding"] == 0)
        evaluate(log, Version(1, 1), 0.6)
        thread.join(10)
        assert not thread.is_alive()
    assert (state(log).health, state(log).numbers["heldout_reward"]) == ("stopped", 0.6)
    assert len(issued(log)) == 7, "a stopped learner needs no more training requests"


def test_at_the_end_of_the_data_the_learner_ends_first_and_its_last_version_is_measured(log):
    publish(log, make_weights(Version(1, 0)))
    with scheduling(log, held_out=HELD_OUT, max_passes=0.5) as thread:
        until(lambda: state(log).numbers.get("exhausted") == 1)
        until(lambda: len(issued(log)) == 4)
        evaluate(log, Version(1, 0), 0.5)
        train = [r for r in issued(log) if r.purpose == "train"]
        end(log, *(make_feedback(r.number, ending="consumed") for r in train))
        until(lambda: state(log).numbers.get("outstanding") == 0)
        publish(log, make_weights(Version(1, 1)))
        append(log, topics.ROLES.name, "learner-0", make_role(health="stopped", message="end of data", time_s=1.0))
        until(lambda: len(issued(log)) == 6)
        evaluate(log, Version(1, 1), 0.6)
        thread.join(10)
        assert not thread.is_alive()
    assert issued(log)[-1].min_version == Version(1, 1)
    assert (len(train), state(log).message) == (2, "end of data")


def test_the_data_also_ends_without_held_out_prompts(log):
    with scheduling(log, max_requests=2) as thread:
        until(lambda: len(issued(log)) == 2)
        end(log, make_feedback(0), make_feedback(1))
        append(log, topics.ROLES.name, "learner-0", make_role(health="stopped", time_s=1.0))
        thread.join(10)
        assert not thread.is_alive()
    assert state(log).message == "end of data"


def test_what_an_earlier_start_of_the_run_said_of_its_learner_is_history(log):
    append(log, topics.ROLES.name, "learner-0", make_role(health="stopped", time_s=1.0))
    with scheduling(log, history=beats(log)) as thread:
        until(lambda: len(issued(log)) == 3)
        end(log, make_feedback(0))
        until(lambda: len(issued(log)) == 4)
        assert thread.is_alive()


@pytest.mark.fault("clock jump", backend="sqlite")
def test_a_learner_whose_clock_has_gone_back_is_still_heard(log):
    """Its beats looked older than the run itself, so the scheduler waited for its end until the clock had caught up."""
    append(log, topics.ROLES.name, "learner-0", make_role(health="ready", time_s=7200.0))
    with scheduling(log, history=beats(log)) as thread:
        until(lambda: len(issued(log)) == 3)
        append(log, topics.ROLES.name, "learner-0", make_role(health="stopped", time_s=3600.0))
        thread.join(10)
        assert not thread.is_alive()
    assert state(log).message == "learner stopped"


@pytest.mark.fault("poison", backend="sqlite")
def test_bytes_that_are_no_feedback_are_dead_lettered_and_hold_nothing_up(log):
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
        log.append([Output(topics.FEEDBACK.name, b"group", b"nonsense")])
        end(log, make_feedback(0))
        until(lambda: len(issued(log)) == 4)
    assert len(list(entries(log, topics.DEAD_LETTER.name))) == 1


def test_bytes_that_are_no_feedback_become_one_dead_letter_however_often_the_scheduler_starts(log):
    """Each start used to write another one."""

    def dead() -> list[bytes]:
        return [decode(DeadLetter, entry.value).value for entry in entries(log, topics.DEAD_LETTER.name)]

    log.append([Output(topics.FEEDBACK.name, b"group", b"while nobody listened")])
    for _ in range(2):
        with scheduling(log):
            until(lambda: state(log).health == "ready")
    assert dead() == [b"while nobody listened"]
    log.append([Output(topics.FEEDBACK.name, b"group", b"later")])
    with scheduling(log):
        until(lambda: len(dead()) == 2)
    assert sorted(dead()) == [b"later", b"while nobody listened"]


def test_bytes_that_are_no_record_stop_no_start_and_the_number_that_they_may_say_is_taken(log):
    """They stopped the scheduler at every start."""
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
    log.append([Output(topic, b"key", b"nonsense") for topic in ("prompts", "weights", "roles")])
    log.append([Output("prompts", b"t3", broken(make_prompt(3, ordinal=3), num_candidates="two"))])
    end(log, make_feedback(0), make_feedback(3, ending="dead_lettered"))
    with scheduling(log):
        log.append([Output("weights", b"key", b"nonsense")])
        until(lambda: state(log).numbers.get("outstanding") == 3)
    assert [(request.number, request.ordinal) for request in issued(log)] == [(0, 0), (1, 1), (2, 2), (4, 4)]


def test_a_slot_that_is_free_is_filled_at_once(log):
    """The quickest of twenty, whatever else the machine does: a scheduler that slept would be late every time."""
    waits = []
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
        with log.assign(log.end_offsets(topics.PROMPTS.name)) as prompts:
            for number in range(20):
                began_s = time.monotonic()
                end(log, make_feedback(number))
                while not prompts.read(max_records=1, timeout_s=5):
                    pass
                waits.append(time.monotonic() - began_s)
    assert min(waits) < 0.02


def test_what_an_overtaken_learner_tells_frees_no_slot(log):
    ends = [(number, end) for (_, number), end in log.end_offsets(topics.FEEDBACK.name).items()]
    publish(log, make_weights(Version(2, 0), fences=[Fence(epoch=2, ends=ends)]))
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
        end(log, make_feedback(0, ending="consumed", epoch=1), make_feedback(1, ending="consumed", epoch=2))
        until(lambda: len(issued(log)) > 3)
    with scheduling(log):  # and it is the same after a restart
        until(lambda: state(log).numbers.get("outstanding") == 3)
    assert [r.number for r in issued(log)] == [0, 1, 2, 3]


def test_a_scheduler_that_was_overtaken_issues_nothing(log):
    heartbeat = Heartbeat(log, Metrics("scheduler"), role="scheduler")
    append(log, topics.ROLES.name, "scheduler-0/2", make_role("scheduler", epoch=2, time_s=1.0))
    with pytest.raises(SupersededError, match="start 2 of this role is running, this is start 1"):
        make_scheduler(log, heartbeat, held_out=[], history=NO_HISTORY).run(threading.Event())
    heartbeat.close()
    assert issued(log) == []


class OvertakenLog(CrashingLog):
    """A real log whose scheduler stands still before an append to `prompts`, from 1, while its heir takes over."""

    def __init__(self, log: Log, heir: Callable[[], object], *, at: int) -> None:
        super().__init__(log)
        self._heir = heir
        self._left = at

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        outputs = list(outputs)
        self._left -= outputs[0].topic == topics.PROMPTS.name
        if self._left == 0:
            self._left = -1
            self._heir()
        return super().append(outputs)


def test_what_a_scheduler_issues_when_its_heir_has_taken_over_is_no_request(log):
    """It used to be sampled, and its number was another request's of the heir."""
    heartbeats = [Heartbeat(log, Metrics("scheduler"), role="scheduler", interval_s=60)]

    def take_over() -> None:
        heartbeats.append(Heartbeat(log, Metrics("scheduler"), role="scheduler", interval_s=60))
        heirs.append(make_scheduler(log, heartbeats[1], held_out=[], history=NO_HISTORY, pipeline_depth=2))

    heirs: list[Scheduler] = []
    publish(log, make_weights(Version(1, 0)))  # so that the zombie's second append are training requests
    zombie_log = OvertakenLog(log, take_over, at=2)
    zombie = make_scheduler(zombie_log, heartbeats[0], held_out=HELD_OUT, history=NO_HISTORY)
    with pytest.raises(SupersededError, match="start 2 of this role is running, this is start 1"):
        zombie.run(threading.Event())
    assert [(r.number, r.purpose) for r in issued(log)] == [
        (0, "eval"),
        (1, "eval"),
        *((n, "train") for n in (2, 3, 4)),
    ]

    stop = threading.Event()
    thread = threading.Thread(target=heirs[0].run, args=(stop,))
    thread.start()
    until(lambda: len(issued(log)) == 7)
    stop.set()
    thread.join()
    for heartbeat in heartbeats:
        heartbeat.close()
    issuers = read_issuers(log)
    requests = [(entry, decode(PromptRequest, entry.value)) for entry in entries(log, topics.PROMPTS.name)]
    counting = [r for entry, r in requests if issuers.verdict(r.claim, entry) == "counts"]
    assert sorted((r.number, r.ordinal) for r in counting if r.purpose == "train") == [(2, 0), (3, 1)]
    assert audit_log(log, policy="policy").num_requests == 4


class PartialLog(CrashingLog):
    """A real log that keeps only these records of an append to `prompts`, from 1, as a cluster may that is failing."""

    def __init__(self, log: Log, *, at: int, kept: Iterable[int]) -> None:
        super().__init__(log)
        self._left = at
        self._kept = set(kept)

    def append(self, outputs: Iterable[Output]) -> list[tuple[int, int]]:
        outputs = list(outputs)
        self._left -= outputs[0].topic == topics.PROMPTS.name
        if self._left != 0:
            return super().append(outputs)
        super().append([output for place, output in enumerate(outputs) if place in self._kept])
        raise LogError("some of it is durable", where="prompts", do="Start again.")


def lose(log: Log, *, at: int, kept: Iterable[int], **changed) -> None:
    """A start of the scheduler that ends at such an append."""
    heartbeat = Heartbeat(log, Metrics("scheduler"), role="scheduler", interval_s=60)
    partial = PartialLog(log, at=at, kept=kept)
    scheduler = make_scheduler(partial, heartbeat, **{"held_out": [], "history": NO_HISTORY, **changed})
    with pytest.raises(LogError, match="some of it is durable"):
        scheduler.run(threading.Event())
    heartbeat.close(health="failed")


@pytest.mark.parametrize("kept", [(), (0,), (1, 4), (0, 2, 5)])
def test_every_request_of_an_append_that_was_durable_in_part_is_issued(log, kept):
    """A number whose request was lost used to be left out for ever, and so was its prompt."""
    lose(log, at=1, kept=kept, pipeline_depth=6)
    assert [r.number for r in issued(log)] == list(kept)
    with scheduling(log, pipeline_depth=6):
        until(lambda: len(issued(log)) == 6)
        end(log, make_feedback(0))
        until(lambda: len(issued(log)) == 7)
    assert [(r.number, r.ordinal, r.prompt_id) for r in issued(log)] == [(i, i, f"t{i % 4}") for i in range(7)]


def test_a_lost_request_waits_for_a_slot_and_is_of_the_data_that_are_left(log):
    lose(log, at=1, kept=(0, 1, 3), pipeline_depth=4)
    with scheduling(log, pipeline_depth=3, max_requests=4):
        until(lambda: state(log).numbers.get("outstanding") == 3)
        assert state(log).numbers["exhausted"] == 0
        end(log, make_feedback(1))
        until(lambda: state(log).numbers["exhausted"] == 1)
    assert [r.number for r in issued(log)] == [0, 1, 2, 3]


def test_a_round_of_which_a_request_was_lost_is_measured_again_and_leaves_no_number_out(log):
    publish(log, make_weights(Version(1, 0)))
    lose(log, at=1, kept=(1,), held_out=HELD_OUT)
    with scheduling(log, held_out=HELD_OUT, pipeline_depth=1):
        until(lambda: len(issued(log)) == 2)
        evaluate(log, Version(1, 0), 0.5)
        until(lambda: len(issued(log)) == 4)
        evaluate(log, Version(1, 0), 0.75)
        until(lambda: state(log).numbers.get("heldout_reward") == 0.75)
    assert [(r.number, r.round) for r in issued(log)] == [(0, None), (1, 0), (2, 1), (3, 1)]


def test_numbers_that_retention_has_taken_uncounted_are_not_issued_again(log):
    with scheduling(log, pipeline_depth=40):
        until(lambda: len(issued(log)) == 40)
    log.trim(dict.fromkeys(log.end_offsets(topics.PROMPTS.name), 2))
    left = {r.number for r in issued(log)}
    assert max(left) == 39 and len(left) < 40
    with scheduling(log, pipeline_depth=len(left) + 1):
        until(lambda: len(issued(log)) == len(left) + 1)
    assert max(r.number for r in issued(log)) == 40


def forget(log: Log, *names: str) -> None:
    """Retention takes everything of these topics, after the books were carried forward."""
    carry(log, ["policy"])
    for name in names:
        log.trim(log.end_offsets(name))


@pytest.mark.parametrize("ending", ["consumed", "trained", "dropped"])
def test_what_ended_before_retention_took_its_ending_takes_no_slot(log, ending):
    """It used to be outstanding for ever: with a pipeline full of such requests nothing was ever issued again."""
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
    end(log, *(make_feedback(number, ending=ending) for number in range(3)))
    forget(log, topics.FEEDBACK.name)
    with scheduling(log):
        until(lambda: len(issued(log)) == 6)
        until(lambda: state(log).numbers.get("outstanding") == 3)
    assert [r.number for r in issued(log)] == list(range(6))


def test_an_example_that_has_not_ended_holds_its_request_past_retention(log):
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
    end(log, make_feedback(0, ending="trained", num_examples=2, index=1), make_feedback(1, ending="trained"))
    forget(log, topics.FEEDBACK.name)
    with scheduling(log):
        until(lambda: len(issued(log)) == 4)
        until(lambda: state(log).numbers.get("outstanding") == 3)


def test_a_dead_letter_that_is_sent_again_past_retention_is_outstanding_once_more(log):
    with scheduling(log):
        until(lambda: len(issued(log)) == 3)
    end(log, make_feedback(0, ending="dead_lettered", stage="scorer"))
    forget(log, topics.FEEDBACK.name)
    end(log, make_feedback(0, ending="redriven", stage="scorer"))
    with scheduling(log):
        until(lambda: state(log).numbers.get("outstanding") == 3)
    assert len(issued(log)) == 3


def test_what_was_lost_on_the_way_is_still_issued_when_retention_has_taken_the_rest(log):
    lose(log, at=1, kept=(0, 2), pipeline_depth=4)
    end(log, make_feedback(0), make_feedback(2))
    forget(log, topics.FEEDBACK.name, topics.PROMPTS.name)
    with scheduling(log, pipeline_depth=2):
        until(lambda: len(issued(log)) == 2)
    assert [(r.number, r.ordinal, r.prompt_id) for r in issued(log)] == [(1, 1, "t1"), (3, 3, "t3")]


def test_no_round_waits_for_what_retention_has_taken(log):
    """A run that was stopped for long could neither measure again nor end."""
    publish(log, make_weights(Version(1, 0)))
    with scheduling(log, held_out=HELD_OUT):
        until(lambda: len(issued(log)) == 5)
        evaluate(log, Version(1, 0), 0.5)
        until(lambda: state(log).numbers.get("heldout_reward") == 0.5)
    forget(log, topics.FEEDBACK.name)
    publish(log, make_weights(Version(1, 9)))
    with scheduling(log, held_out=HELD_OUT, eval_every=2):
        until(lambda: len(issued(log)) == 7)
    assert {(r.round, r.min_version) for r in issued(log)[-2:]} == {(1, Version(1, 9))}
