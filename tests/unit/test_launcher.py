import signal
from pathlib import Path

import pytest
import yaml

from deploy.config import RunConfig, load_config
from deploy.launcher import Interrupts, Outcome, limit, prepare
from streaming.errors import ConfigError
from streaming.evaluation import Measurement
from streaming.records import Version
from tests.builders import LEAST


def config(folder: Path, **changed) -> RunConfig:
    (folder / "run.yaml").write_text(yaml.safe_dump({**LEAST, "model": "owner/model", **changed}))
    return load_config(folder / "run.yaml")


def measured(mean: float, *, round: int = 0) -> Measurement:
    return Measurement(round, Version(1, 8 * round), mean, 2, 2, True)


def test_the_held_out_target_ends_the_run(tmp_path):
    settings = config(tmp_path, stop={"heldout_reward": 0.9})
    assert limit(settings, None, 1e9) is None
    assert limit(settings, measured(0.89), 1e9) is None
    assert limit(settings, measured(0.9), 1e9) == "held-out reward 0.900 has reached 0.9"


def test_the_minutes_end_the_run(tmp_path):
    settings = config(tmp_path, stop={"max_minutes": 2})
    assert limit(settings, None, 119.9) is None
    assert limit(settings, None, 120.0) == "2 minutes have passed"


def test_a_run_without_limits_goes_on(tmp_path):
    assert limit(config(tmp_path), measured(1.0), 1e9) is None


def test_a_first_start_keeps_its_settings_and_notes_no_change(tmp_path):
    assert prepare(config(tmp_path)) == []
    assert (tmp_path / "runs" / "mine" / "config.yaml").exists()


def test_a_second_start_notes_what_has_changed(tmp_path):
    prepare(config(tmp_path))
    [change] = prepare(config(tmp_path, learner={"optimizer": {"learning_rate": 0.5}}))
    assert (change.path, change.old, change.new) == ("learner.optimizer.learning_rate", 1e-6, 0.5)
    assert prepare(config(tmp_path, learner={"optimizer": {"learning_rate": 0.5}})) == []


def begun(folder: Path, **changed) -> RunConfig:
    """A run whose learner has published its first version."""
    (folder / "runs" / "mine" / "weights").mkdir(parents=True)
    return config(folder, **changed)


def test_a_run_that_never_began_may_change_everything(tmp_path):
    """A wrong model's name used to bind the directory, and the mended command was refused."""
    prepare(config(tmp_path, model="mdoel"))
    assert [change.path for change in prepare(config(tmp_path))] == ["model"]


@pytest.mark.parametrize(
    "other",
    [
        {"model": "another/model"},
        {"policy": "other"},
        {"log": {"url": "sqlite:///other.db"}},
        {"prompts": {"path": "prompts.jsonl", "max_eval_prompts": 7}},
    ],
)
def test_the_directory_of_another_run_is_refused_and_left_as_it_is(tmp_path, other):
    prepare(begun(tmp_path))
    saved = tmp_path / "runs" / "mine" / "config.yaml"
    before = saved.read_text()
    with pytest.raises(ConfigError, match="holds another run"):
        prepare(config(tmp_path, **other))
    assert saved.read_text() == before


def test_without_zero_the_number_of_ranks_may_change(tmp_path):
    prepare(begun(tmp_path, learner={"zero_stage": 0}))
    prepare(config(tmp_path, learner={"zero_stage": 0, "world_size": 2}))


@pytest.mark.parametrize("sharded", [{"zero_stage": 1}, {"dtype": "bfloat16"}])
def test_with_zero_the_number_of_ranks_is_bound_to_the_checkpoints(tmp_path, sharded):
    """Every rank's checkpoint holds its own part. That bfloat16 always takes ZeRO used to be overlooked."""
    prepare(begun(tmp_path, learner=sharded))
    with pytest.raises(ConfigError, match=r"learner\.world_size was 1, now is 2"):
        prepare(config(tmp_path, learner={**sharded, "world_size": 2}))


def test_a_further_policy_may_come_and_go_but_not_change_what_its_checkpoints_are_bound_to(tmp_path):
    prepare(begun(tmp_path))
    prepare(config(tmp_path, policies={"b": {"learner": {"zero_stage": 1}}}))
    prepare(config(tmp_path, policies={"b": {"learner": {"zero_stage": 1, "max_steps": 3}}}))
    for bound in ({"model": "another/model"}, {"reference": "another/model"}, {"learner": {"dtype": "bfloat16"}}):
        with pytest.raises(ConfigError, match=r"holds another run: policies\.b\."):
            prepare(config(tmp_path, policies={"b": {"learner": {"zero_stage": 1}, **bound}}))
    with pytest.raises(ConfigError, match=r"policies\.b\.learner\.world_size"):
        prepare(config(tmp_path, policies={"b": {"learner": {"zero_stage": 1, "world_size": 2}}}))
    prepare(config(tmp_path))


def test_the_first_signal_asks_and_the_second_is_in_a_hurry():
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.caught():
        signal.raise_signal(signal.SIGTERM)
        assert (interrupts.asked.is_set(), interrupts.hurry.is_set()) == (True, False)
        signal.raise_signal(signal.SIGINT)
        assert interrupts.hurry.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_outcome_names_its_best_measurement():
    assert Outcome("", 0.0, [measured(0.1), measured(0.3, round=1), measured(0.2, round=2)]).best == measured(
        0.3, round=1
    )
    assert Outcome("", 0.0, []).best is None
