import json
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from deploy.check import all_checks, check_disk, check_model_files, check_ports, describe_pipeline, preflight
from deploy.config import RunConfig, load_config
from deploy.tiny_model import save_tiny_model
from streaming.errors import DataError, NotReadyError, StreamDPOError
from tests.builders import LEAST


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "model", chat_template=False)


def prepared(folder: Path, model: Path, *, prompts: list | None = None, **changed) -> RunConfig:
    """A run whose files are all there."""
    rows = [{"prompt": f"{n}+1=", "answer": n + 1} for n in range(4)] if prompts is None else prompts
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text("def score(completions, **rest):\n    return [len(c) for c in completions]\n")
    settings = {
        **LEAST,
        "model": str(model),
        "generation": {"engine": {"kind": "transformers"}},
        **changed,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return load_config(folder / "run.yaml")


def test_a_run_whose_files_are_all_there_has_nothing_to_mend(tmp_path, model):
    findings = {finding.subject: finding for finding in all_checks(prepared(tmp_path, model))}
    assert [str(finding.error) for finding in findings.values() if finding.error] == []
    assert findings["prompts"].note.startswith("4 texts, columns for rewards: answer; none held out")
    assert findings["reward length"].note == "gave 2, 19 on trial"
    assert findings["model"].note.startswith("llama, vocabulary ")


def test_one_failed_check_does_not_stop_the_others(tmp_path, model):
    config = prepared(tmp_path, tmp_path / "nowhere")
    (tmp_path / "prompts.jsonl").write_text("")
    failed = {finding.subject: finding.error for finding in all_checks(config) if finding.error}
    assert list(failed) == ["prompts", "model"]
    assert [error.exit_code for error in failed.values()] == [2, 3]


def test_messages_for_a_model_without_chat_template_are_found_before_the_run(tmp_path, model):
    config = prepared(tmp_path, model, prompts=[{"prompt": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(DataError, match="no chat template"):
        preflight(config)


def test_a_reward_that_raises_is_found_before_the_run(tmp_path, model):
    config = prepared(tmp_path, model)
    (tmp_path / "reward.py").write_text("def score(completions, **rest):\n    raise ValueError('bad weather')\n")
    with pytest.raises(DataError, match="raised ValueError: bad weather"):
        preflight(config)


def test_a_reward_model_with_one_output_passes(tmp_path, model):
    classifier(tmp_path / "judge", model, num_labels=1)
    config = prepared(tmp_path, model, rewards=[{"name": "judge", "model": str(tmp_path / "judge")}])
    preflight(config)
    note = next(finding.note for finding in all_checks(config) if finding.subject == "reward judge")
    assert note.endswith("LlamaForSequenceClassification")


def test_a_reward_model_with_two_outputs_is_found_before_the_run(tmp_path, model):
    classifier(tmp_path / "judge", model, num_labels=2)
    with pytest.raises(NotReadyError, match="has 2 outputs, a reward model has 1"):
        preflight(prepared(tmp_path, model, rewards=[{"name": "judge", "model": str(tmp_path / "judge")}]))


def test_a_reward_model_that_writes_text_is_found_before_the_run(tmp_path, model):
    with pytest.raises(NotReadyError, match="is a LlamaForCausalLM, no sequence classifier"):
        preflight(prepared(tmp_path, model, rewards=[{"name": "judge", "model": str(model)}]))


def test_a_reward_model_that_cannot_read_conversations_is_found_before_the_run(tmp_path, model):
    classifier(tmp_path / "judge", model, num_labels=1)
    chat = save_tiny_model(tmp_path / "chat")
    rows = [{"prompt": [{"role": "user", "content": "Hi"}]}]
    rewards = [{"name": "judge", "model": str(tmp_path / "judge")}]
    with pytest.raises(NotReadyError, match="its tokenizer has no chat template"):
        preflight(prepared(tmp_path, chat, prompts=rows, rewards=rewards))


def test_a_name_that_is_neither_a_directory_nor_on_the_hub_is_found_before_the_run(tmp_path):
    with pytest.raises(NotReadyError, match="is no directory here, and the hub does not give it"):
        preflight(prepared(tmp_path, Path("no-such-model-anywhere")))


def classifier(directory: Path, model: Path, *, num_labels: int) -> None:
    """A sequence classifier with the tokenizer and the body of this model."""
    from transformers import AutoModelForSequenceClassification

    shutil.copytree(model, directory)
    found = AutoModelForSequenceClassification.from_pretrained(model, num_labels=num_labels)
    found.save_pretrained(directory)


@pytest.mark.parametrize("missing", ["config.json", "*.safetensors", "tokenizer*"])
def test_a_model_directory_that_is_not_complete_is_named_with_what_it_lacks(tmp_path, model, missing):
    shutil.copytree(model, tmp_path / "model")
    for file in (tmp_path / "model").glob(missing):
        file.unlink()
    with pytest.raises(NotReadyError, match="has no " + missing.rstrip("*").replace("*.", r"\*.")):
        check_model_files(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda content: b"nonsense", "is not a safetensors file"),
        (lambda content: b"", "is not a safetensors file"),
        (lambda content: content[:-1], "its header says"),
        (lambda content: content + b"x", "its header says"),
    ],
)
def test_a_broken_weights_file_is_named_without_loading_it(tmp_path, model, damage, what):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(NotReadyError, match=what) as caught:
        check_model_files(str(tmp_path / "model"))
    assert caught.value.where == str(file)


def test_a_wrong_model_path_is_named(tmp_path):
    with pytest.raises(NotReadyError, match="nowhere: is not a directory"):
        check_model_files(str(tmp_path / "nowhere"))


def test_a_long_prompt_that_leaves_no_room_is_told(tmp_path, model):
    config = prepared(tmp_path, model, prompts=[{"prompt": "1" * 500}])
    note = next(finding.note for finding in all_checks(config) if finding.subject == "model")
    assert "the longest prompt has 500 tokens: 12 of 256 are left for its answer" in note


def test_a_pipeline_that_leaves_generators_idle_is_told(tmp_path, model):
    config = prepared(tmp_path, model, scheduler={"pipeline_depth": 40})
    assert "batch_size + generators x concurrency = 96" in describe_pipeline(config)


def test_a_taken_port_is_found(tmp_path, model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = prepared(tmp_path, model, metrics={"port": taken.getsockname()[1]})
        with pytest.raises(NotReadyError, match="cannot be listened on"):
            check_ports(config)


def test_a_disk_that_is_too_small_is_found(tmp_path, model):
    config = prepared(tmp_path, model, learner={"checkpoint": {"keep": 10**9}})
    with pytest.raises(NotReadyError, match="GB are needed for versions and checkpoints"):
        check_disk(config)


def test_every_policy_of_a_run_needs_room_on_the_disk(tmp_path, model):
    """Only the run's own was counted, however much a further one keeps."""
    greedy = {"learner": {"checkpoint": {"keep": 10**9}}}
    check_disk(prepared(tmp_path, model))
    with pytest.raises(NotReadyError, match="GB are needed for versions and checkpoints"):
        check_disk(prepared(tmp_path, model, policies={"b": greedy}))
    note = check_disk(prepared(tmp_path, model, policies={"b": {"model": "owner/name"}}))
    assert note.endswith("its size is not known yet: owner/name")


def test_a_reference_that_is_not_there_is_found_before_the_run(tmp_path, model):
    """The run started all the same, and its scorer failed."""
    config = prepared(tmp_path, model, scoring={"reference": str(tmp_path / "frozen")})
    failed = {finding.subject: str(finding.error) for finding in all_checks(config) if finding.error}
    assert list(failed) == ["reference"]
    assert failed["reference"].startswith(f"{tmp_path}/frozen: is not a model directory")
    with pytest.raises(NotReadyError, match="frozen: is not a model directory"):
        preflight(config)


def test_the_errors_of_a_check_say_what_to_do(tmp_path, model):
    config = prepared(tmp_path, tmp_path / "nowhere")
    error = next(finding.error for finding in all_checks(config) if finding.error)
    assert isinstance(error, StreamDPOError)
    assert error.do
