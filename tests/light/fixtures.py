"""Where light runs lie: for each test a function that plays a plan on one backend and judges it."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.tiny_model import save_tiny_model
from tests.learner_process import CONTEXT
from tests.light.plan import Plan
from tests.light.run import Embedded, LightRun, OnKafka, light_run
from tests.light.verdict import Verdict, judge
from tests.secured import secure

Played = tuple[LightRun, Verdict]
Play = Callable[[Plan], Played]

SESSION_S = 1.5
"""A member of a group that died is missed so soon on Kafka; our test brokers allow a second."""

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and a first process: before it nothing is imported where processes are forked from."""
    first = CONTEXT.Process(target=_do_nothing)
    first.start()
    first.join()
    return Path(save_tiny_model(tmp_path_factory.mktemp("model"), tied=True))


def _do_nothing() -> None:
    return


@pytest.fixture(params=["sqlite", "kafka"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def play(backend: str, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Play:
    """Plays a plan: in a file, or on a broker where each role is a user with exactly its rights."""
    if backend == "sqlite":
        return lambda plan: _played(light_run(plan, tmp_path, Embedded(tmp_path), tiny_model))
    cluster = request.getfixturevalue("scram_kafka")

    def on_kafka(plan: Plan) -> Played:
        name = f"light-{next(NUMBERS)}"
        secured = secure(cluster, tmp_path, name, partitions=4, session_timeout_s=SESSION_S, delivery_timeout_s=120)
        try:
            return _played(light_run(plan, tmp_path, OnKafka(secured), tiny_model, run=name))
        finally:
            secured.remove()

    return on_kafka


def _played(run: LightRun) -> Played:
    run.play()
    return run, judge(run)
