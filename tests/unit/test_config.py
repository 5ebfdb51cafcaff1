from pathlib import Path

import pytest
import yaml

from deploy.config import RunConfig, changes, json_schema, load_config, load_run, run_directory, save_config
from streaming.config import Reload
from streaming.errors import ConfigError
from tests.builders import LEAST


def write(path: Path, **changed) -> Path:
    path.write_text(yaml.safe_dump(LEAST | changed))
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_paths_are_relative_to_the_file_and_come_back_absolute(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("prompts.jsonl", "reward.py"):
        (tmp_path / name).touch()
    config = load_config(write(tmp_path / "run.yaml"))
    assert config.model == str(tmp_path / "model")
    assert config.prompts.path == str(tmp_path / "prompts.jsonl")
    assert config.rewards[0].function == f"{tmp_path}/reward.py:score"
    assert config.directory == str(tmp_path / "runs" / "mine")


def test_a_missing_file_is_named_where_it_was_looked_for(tmp_path):
    config = load_config(write(tmp_path / "run.yaml"))
    assert config.prompts.path == str(tmp_path / "prompts.jsonl")
    assert config.rewards[0].function == f"{tmp_path}/reward.py:score"


def test_files_and_stores_of_a_cluster_are_relative_to_the_file_too(tmp_path):
    """They were read as they stood there, so that `status` from another directory than `run`'s found no ca.pem."""
    names = ["ca_file", "certificate_file", "key_file", "key_password_file", "password_file"]
    kafka = {name: f"{name}.pem" for name in names} | {"sasl_mechanism": "PLAIN", "username": "me"}
    stores = {
        "log": {"url": "kafka://broker:9092", "blobs": "blobs", "kafka": kafka},
        "generation": {"weights_cache": "cache"},
        "learner": {"publish": {"url": "published"}},
        "policies": {"b": {"learner": {"publish": {"url": "others"}}}, "c": None},
    }
    config = load_config(write(tmp_path / "run.yaml", **stores))
    assert [getattr(config.log.kafka, name) for name in names] == [f"{tmp_path}/{name}.pem" for name in names]
    assert (config.log.blobs, config.generation.weights_cache) == (f"{tmp_path}/blobs", f"{tmp_path}/cache")
    urls = [policy.learner.publish.url for policy in config.every_policy]
    assert urls == [f"{tmp_path}/{name}" for name in ("published", "others", "published")]


def test_authorities_of_the_system_and_urls_stay_as_they_are(tmp_path):
    kafka = {"ca_file": "system", "sasl_mechanism": "OAUTHBEARER", "token_file": "token"}
    log = {"url": "kafka://broker:9092", "blobs": "s3://bucket/blobs", "kafka": kafka}
    config = load_config(write(tmp_path / "run.yaml", log=log, learner={"publish": {"url": "s3://bucket/weights"}}))
    assert (config.log.kafka.ca_file, config.log.kafka.token_file) == ("system", f"{tmp_path}/token")
    assert (config.log.blobs, config.learner.publish.url) == ("s3://bucket/blobs", "s3://bucket/weights")


def test_hub_names_and_modules_stay_as_they_are(tmp_path):
    rewards = [{"name": "a", "function": "package.module:function"}]
    config = load_config(
        write(tmp_path / "run.yaml", model="owner/name", prompts={"path": "trl-lib/data"}, rewards=rewards)
    )
    assert (config.model, config.prompts.path) == ("owner/name", "trl-lib/data")
    assert config.rewards[0].function == "package.module:function"


def test_an_override_reaches_into_sections_that_the_file_leaves_out_and_into_lists(tmp_path):
    path = write(tmp_path / "run.yaml")
    overrides = ["learner.batch.batch_size=4", "rewards.0.weight=0.5", "stop.max_minutes=2", "name=other"]
    config = load_config(path, overrides)
    assert config.learner.batch.batch_size == 4
    assert config.rewards[0].weight == 0.5
    assert config.stop.max_minutes == 2
    assert config.directory == str(tmp_path / "runs" / "other")


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("learner", "--set learner: has no value"),
        ("=1", "--set =1: has no value"),
        ("rewards.3.weight=1", "'3' is no place in a list of 1"),
        ("rewards.first.weight=1", "'first' is no place in a list of 1"),
        ("name.a=1", "'a' lies in a value, not in a section"),
        ("name.a.b=1", "'a' lies in a value, not in a section"),
        ("name=[", "has a value that is not YAML"),
    ],
)
def test_a_bad_override_is_named(tmp_path, override, what):
    assert what in error_of(write(tmp_path / "run.yaml"), override)


def test_an_unknown_setting_is_refused_with_the_nearest_name(tmp_path):
    text = error_of(write(tmp_path / "run.yaml", selection={"min_margn": 1}))
    assert "selection.min_margn" in text
    assert "Did you mean 'min_margin'?" in text


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused(tmp_path, value):
    text = error_of(write(tmp_path / "run.yaml", learner={"optimizer": {"learning_rate": value}}))
    assert "learner.optimizer.learning_rate" in text
    assert "finite" in text


def test_every_wrong_setting_is_named_at_once(tmp_path):
    text = error_of(write(tmp_path / "run.yaml", name="Mine", generation={"num_generators": 0}))
    assert "2 settings are wrong" in text
    assert "generation.num_generators" in text


def test_a_pipeline_that_never_fills_a_batch_is_refused(tmp_path):
    text = error_of(write(tmp_path / "run.yaml"), "scheduler.pipeline_depth=32", "learner.batch.batch_size=32")
    assert "scheduler.pipeline_depth (32) must be larger than learner.batch.batch_size (32)" in text


@pytest.mark.parametrize("content", ["", "- a", "a: [", "\x00"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    assert str(tmp_path / "run.yaml") in error_of(tmp_path / "run.yaml")


def test_a_missing_file_is_a_configuration_error(tmp_path):
    assert "cannot be read: No such file" in error_of(tmp_path / "nowhere.yaml")


def test_saved_settings_load_again_as_they_were(tmp_path):
    (tmp_path / "model").mkdir()
    config = load_config(write(tmp_path / "run.yaml"))
    run = run_directory(config)
    run.mkdir(parents=True)
    save_config(config, run / "config.yaml")
    assert load_run(run) == config
    assert load_run(tmp_path / "run.yaml") == config


def test_a_moved_run_is_found_where_it_lies_now(tmp_path):
    config = load_config(write(tmp_path / "run.yaml"))
    (tmp_path / "moved").mkdir()
    save_config(config, tmp_path / "moved" / "config.yaml")
    assert load_run(tmp_path / "moved").directory == str(tmp_path / "moved")


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not the directory of a run"):
        load_run(tmp_path)


def test_changes_name_the_setting_and_when_it_may_change(tmp_path):
    path = write(tmp_path / "run.yaml")
    found = changes(load_config(path), load_config(path, ["learner.optimizer.learning_rate=1.0", "model=x/y"]))
    assert [(c.path, c.old, c.new, c.reload) for c in found] == [
        ("model", "model", "x/y", Reload.RESTART),
        ("learner.optimizer.learning_rate", 1e-6, 1.0, Reload.STEP),
    ]


def test_a_further_policy_is_as_the_run_where_it_says_nothing(tmp_path):
    policies = {"b": {"model": "other", "learner": {"optimizer": {"learning_rate": 0.5}}}, "c": None}
    config = load_config(
        write(tmp_path / "run.yaml", policies=policies, scoring={"reference": "frozen"}),
        ["learner.optimizer.warmup_steps=3", "learner.batch.batch_size=8", "selection.min_margin=0.25"],
    )
    own, b, c = config.every_policy
    assert (own.name, own.is_sampled, b.name, b.is_sampled) == ("policy", True, "b", False)
    assert (b.learner.optimizer.learning_rate, b.learner.optimizer.warmup_steps) == (0.5, 3)
    assert (b.learner.batch.batch_size, b.selection) == (8, own.selection)
    assert (b.model, b.reference) == ("other", "other"), "its reference is where it began"
    assert c._replace(name=own.name, is_sampled=True) == own


def test_settings_with_further_policies_load_again_as_they_were(tmp_path):
    (tmp_path / "model").mkdir()
    path = write(tmp_path / "run.yaml", policies={"b": {"model": "model"}}, learner={"batch": {"batch_size": 8}})
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config.policies["b"].model == str(tmp_path / "model")


def test_a_wrong_setting_of_a_further_policy_is_named_and_an_inherited_one_once(tmp_path):
    text = error_of(write(tmp_path / "run.yaml", policies={"b": {"learner": {"loss": {"bta": 1}}}}))
    assert "policies.b.learner.loss.bta" in text
    assert "Did you mean 'beta'?" in text
    text = error_of(write(tmp_path / "run.yaml", policies={"b": {}}, learner={"max_steps": 0}))
    assert "1 setting is wrong" in text


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"policies": {"policy": {}}}, "the name of the run's own policy"),
        ({"policies": {"B": {}}}, "policies.B"),
        ({"policies": {"b": {"learner": {"optimizer": {"schedule": "cosine"}}}}}, "of b needs learner.max_steps"),
    ],
)
def test_a_further_policy_that_cannot_be_is_refused(tmp_path, changed, what):
    assert what in error_of(write(tmp_path / "run.yaml", **changed))


def test_changes_of_a_further_policy_are_named_one_by_one(tmp_path):
    path = write(tmp_path / "run.yaml", policies={"b": {}})
    found = changes(load_config(path), load_config(path, ["policies.b.learner.optimizer.learning_rate=1.0"]))
    assert [(c.path, c.reload) for c in found] == [("policies.b.learner.optimizer.learning_rate", Reload.STEP)]


def test_the_schema_documents_every_setting_and_says_when_it_takes_effect():
    schema = json_schema()
    places = [("RunConfig", schema), *schema["$defs"].items()]
    for name, section in places:
        for field, described in section.get("properties", {}).items():
            target = schema["$defs"].get(described.get("$ref", "").rpartition("/")[2], described)
            assert target.get("description"), f"{name}.{field} has no docstring"
            assert target is not described or described["x-reload"] in ("live", "step", "restart"), f"{name}.{field}"
    assert schema["$defs"]["SamplingConfig"]["properties"]["temperature"]["x-reload"] == "live"
    assert RunConfig.model_fields.keys() == schema["properties"].keys()
