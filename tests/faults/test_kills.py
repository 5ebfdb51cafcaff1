"""Every role is killed once while a run goes on: it ends by itself, nothing is lost, and nothing is trained twice.

One run for all promises. A kill comes at a known moment: processes are frozen, looked at, and killed or let go on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import yaml

from deploy.config import RunConfig, load_config, run_directory
from deploy.roles import log_path, open_run_log
from deploy.status import Status, read_status
from deploy.tiny_model import save_tiny_model
from learner import checkpoint
from streaming import topics
from streaming.audit import audit_log
from streaming.heartbeat import role_states
from streaming.history import entries
from streaming.log.protocol import Log
from streaming.records import Feedback, Group, Pair, PromptRequest, Record, RoleState, Version, WeightVersion, decode

pytestmark = [pytest.mark.slow, pytest.mark.fault("kill: every role of a run on Ray", backend="sqlite")]

R = TypeVar("R", bound=Record)

PATIENCE_S = 240
"""Longest wait for anything: a quiet machine takes a tenth of it."""

ROLES = ["generator-0", "learner-0", "scheduler-0", "scorer-0", "selector-0"]
NUM_REQUESTS = 160
SETTINGS: dict[str, Any] = {
    "name": "kills",
    "model": "model",
    "prompts": {"path": "prompts.jsonl"},
    "rewards": [{"name": "judge", "function": "reward.py:judge"}],
    "generation": {
        "concurrency": 8,
        "sampling": {"num_candidates": 2, "max_tokens": 8},
        "engine": {"kind": "transformers", "num_threads": 1},
    },
    "scheduler": {"pipeline_depth": 32, "max_requests": NUM_REQUESTS},
    "scoring": {"num_threads": 1},
    "learner": {
        "num_threads": 1,
        "optimizer": {"learning_rate": 1.0e-4, "warmup_steps": 0},
        "batch": {"batch_size": 4},
        "checkpoint": {"every_steps": 6},
    },
}
JUDGE = """
import asyncio, zlib

async def judge(completions, **columns):
    await asyncio.sleep(0.03)  # so that groups are with the judge at any moment
    return [zlib.crc32(completion.encode()) % 1000 / 1000 for completion in completions]
"""


class Run:
    """A run in progress, seen through its log."""

    def __init__(self, config: RunConfig, log: Log, process: subprocess.Popen[str]) -> None:
        self.config = config
        self.log = log
        self.process = process
        self.kills: dict[str, RoleState] = {}

    def until(self, holds: Callable[[], bool]) -> None:
        """Return once it holds; a run that ends before fails."""
        limit_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, "the run ended too early" + self.story()
            assert time.monotonic() < limit_s, "it never came to this" + self.story()
            time.sleep(0.01)

    def state(self, role_id: str) -> RoleState | None:
        return role_states(self.log).get(role_id)

    def status(self) -> Status:
        return read_status(self.log, self.config)

    def kill(self, *role_ids: str, when: Callable[[], bool] = lambda: True) -> None:
        """SIGKILL these roles at the same moment, at one when `when` holds."""
        states = [self.running(role_id) for role_id in role_ids]

        def is_done() -> bool:
            with frozen([state.pid for state in states]) as pids:
                if when():
                    for pid in pids:
                        os.kill(pid, signal.SIGKILL)
                    return True
            return False

        self.until(is_done)
        self.kills |= {state.role_id: state for state in states}

    def finish(self) -> str:
        """What the run printed, once it has ended by itself."""
        try:
            output, _ = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail("the run does not end" + self.story())
        assert self.process.returncode == 0, output + self.story()
        return output

    def running(self, role_id: str) -> RoleState:
        self.until(lambda: (state := self.state(role_id)) is not None and state.health == "ready")
        state = self.state(role_id)
        assert state is not None
        return state

    def has_work(self, role: str) -> bool:
        """Whether there is something in its input topic that it has not settled."""
        return self.status().lags[role] > 0

    def is_back(self, role_id: str) -> bool:
        state = self.state(role_id)
        return state is not None and state.epoch > self.kills[role_id].epoch and state.health == "ready"

    def records(self, topic: topics.Topic, kind: type[R]) -> list[R]:
        return [decode(kind, entry.value, where=entry.where) for entry in entries(self.log, topic.name)]

    def trained_steps(self) -> int:
        """Steps of the newest published version."""
        newest = newest_weights(self.log)
        return 0 if newest is None else newest.step

    def saved_steps(self) -> int:
        """Steps of the newest durable checkpoint."""
        found = checkpoint.newest(run_directory(self.config) / "checkpoints" / "policy")
        return 0 if found is None else found.state.step

    def story(self) -> str:
        """What is needed to see what happened."""
        directory = run_directory(self.config)
        lines = [f"\nrun: {directory}", f"kills: {[(s.role_id, s.pid, s.numbers) for s in self.kills.values()]}"]
        lines += [f"state: {state}" for state in role_states(self.log).values()]
        lines += [f"audit: {audit_log(self.log, policy='policy')}"]
        logs = [log_path(self.config, role_id) for role_id in [*ROLES, "launcher"]]
        lines += [f"--- {path}\n{path.read_text()[-2000:]}" for path in logs if path.exists()]
        return "\n".join(lines)


def newest_weights(log: Log) -> WeightVersion | None:
    found = [decode(WeightVersion, entry.value) for entry in log.newest(topics.WEIGHTS.name).values()]
    return max(found, key=lambda one: one.version, default=None)


@contextmanager
def frozen(pids: list[int]) -> Iterator[list[int]]:
    """These processes stand still inside the block; those that live then go on."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def write_run(folder: Path, **changed: Any) -> RunConfig:
    save_tiny_model(folder / "model")
    rows = [{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(JUDGE)
    (folder / "run.yaml").write_text(yaml.safe_dump({**SETTINGS, **changed}))
    return load_config(folder / "run.yaml")


@contextmanager
def started(config: RunConfig, folder: Path) -> Iterator[Run]:
    """`streamdpo run`; stopped on the way out if it still runs."""
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "run", "run.yaml"]
    with (
        open_run_log(config) as log,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        run = Run(config, log, process)
        run.status()  # a log registers a topic at its first use, and that is no reading
        try:
            yield run
        finally:
            if process.poll() is None:
                process.terminate()
                process.terminate()  # in a hurry


class Over(NamedTuple):
    """A run that has ended by itself, and what was known at the moment of the learner's death."""

    run: Run
    output: str
    published: WeightVersion
    saved: checkpoint.State


@pytest.fixture(scope="module")
def over(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Over]:
    folder = tmp_path_factory.mktemp("kills")
    config = write_run(folder)
    with started(config, folder) as run:
        run.until(lambda: run.trained_steps() >= 2)
        run.kill("generator-0", "scorer-0", when=lambda: run.has_work("generator") and run.has_work("scorer"))
        run.kill("selector-0")
        before = run.trained_steps()
        run.until(lambda: all(map(run.is_back, run.kills)) and run.trained_steps() > before)
        run.kill("learner-0", when=lambda: run.trained_steps() > run.saved_steps() > 0)
        published = newest_weights(run.log)
        saved = checkpoint.newest(run_directory(config) / "checkpoints" / "policy")
        run.kill("scheduler-0", when=lambda: not is_exhausted(run))
        output = run.finish()
        assert published is not None and saved is not None
        yield Over(run, output, published, saved.state)


def is_exhausted(run: Run) -> bool:
    return sum(run.log.end_offsets(topics.PROMPTS.name).values()) >= NUM_REQUESTS


def test_the_run_ends_by_itself_at_the_end_of_its_data(over: Over) -> None:
    assert "end of data" in over.output, over.output
    assert {state.health for state in role_states(over.run.log).values()} == {"stopped"}, over.run.story()


def test_every_role_was_started_once_more_and_none_twice(over: Over) -> None:
    assert {role_id: over.run.state(role_id).epoch for role_id in ROLES} == dict.fromkeys(ROLES, 2), over.run.story()


def test_every_request_was_issued_once_and_ended_exactly_one_way(over: Over) -> None:
    numbers = [request.number for request in over.run.records(topics.PROMPTS, PromptRequest)]
    assert sorted(numbers) == list(range(NUM_REQUESTS)), over.run.story()
    balance = audit_log(over.run.log, policy="policy")
    assert balance.is_balanced and not balance.unknown, over.run.story()
    assert balance.num_requests == NUM_REQUESTS
    assert balance.count("dead_lettered") == 0


def test_nothing_is_trained_twice_in_the_lineage_that_survives(over: Over) -> None:
    surviving = {one for one in in_steps(over.run) if one.epoch == 2 or one.step <= over.saved.step}
    assert {one.epoch for one in surviving} == {1, 2}
    assert len({(one.request_number, one.index) for one in surviving}) == len(surviving), over.run.story()
    assert trained(over.run) == surviving, over.run.story()


def test_the_generator_never_goes_back_to_an_older_lineage(over: Over) -> None:
    published, saved = over.published.version, over.saved.version
    assert saved < published and published.epoch == saved.epoch == 1
    groups = sorted(over.run.records(topics.CANDIDATES, Group), key=lambda group: group.sampled_s)
    versions = [span.version for group in groups for candidate in group.candidates for span in candidate.spans]
    assert versions == sorted(versions), "it never went back"
    assert versions[0] == Version(1, 0)
    assert versions[-1].epoch == 2


def test_nothing_that_a_lost_version_sampled_is_trained_on(over: Over) -> None:
    """What was published after the newest checkpoint has no descendants."""
    pairs = {(pair.pair_id, pair.content_hash): pair for pair in over.run.records(topics.pairs("policy"), Pair)}
    later = [one for one in over.run.records(topics.FEEDBACK, Feedback) if one.ending == "trained" and one.epoch == 2]
    versions = {version for one in later for version in versions_of(pairs[one.pair_id, one.content_hash])}
    assert versions
    assert not [version for version in versions if version.epoch == 1 and version > over.saved.version]


def versions_of(pair: Pair) -> Iterable[Version]:
    return {span.version for side in (pair.chosen, pair.rejected) if side is not None for span in side.spans}


def test_steps_that_no_checkpoint_holds_are_taken_again_and_the_generator_follows_from_lower_numbers(
    tmp_path: Path,
) -> None:
    """The learner dies when all is consumed and nothing saved. What it had consumed used to be lost for ever."""
    learner = {**SETTINGS["learner"], "batch": {"batch_size": 1}, "checkpoint": {"every_steps": 1000}}
    config = write_run(tmp_path, learner=learner, scheduler={"pipeline_depth": 16, "max_requests": 12})
    with started(config, tmp_path) as run:
        scheduler = run.running("scheduler-0")
        run.until(lambda: sum(run.log.end_offsets(topics.PROMPTS.name).values()) == 12)
        with frozen([scheduler.pid]):
            run.until(lambda: {one.request_number for one in run.records(topics.FEEDBACK, Feedback)} == set(range(12)))
            lost = Version(1, len(in_steps(run)))
            run.until(lambda: held(run) == lost)
            run.kill("learner-0")
            run.until(lambda: (version := held(run)) is not None and version.epoch == 2)
            assert held(run).number <= lost.number
        assert "end of data" in run.finish()
        assert audit_log(run.log, policy="policy").is_balanced, run.story()
        assert {one.epoch for one in trained(run)} == {2}


def held(run: Run) -> Version | None:
    """The version that the generator says it samples with."""
    state = run.state("generator-0")
    return None if state is None else state.version


class Place(NamedTuple):
    """Which step an example was in."""

    request_number: int
    index: int
    epoch: int
    step: int


def in_steps(run: Run) -> set[Place]:
    """Every example that was ever in a step."""
    return places(run, "consumed")


def trained(run: Run) -> set[Place]:
    """Every example that a durable checkpoint holds."""
    return places(run, "trained")


def places(run: Run, ending: str) -> set[Place]:
    found = [one for one in run.records(topics.FEEDBACK, Feedback) if one.ending == ending and not one.reason]
    return {Place(one.request_number, one.index, one.epoch, one.step) for one in found}
