"""What the README shows, works: its commands, its files, its names."""

import asyncio
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from actors.prompts import Prompt, read_prompts
from deploy.check import preflight
from deploy.cli import app
from deploy.config import RunConfig, load_config
from deploy.tiny_model import save_tiny_model
from streaming.config import LogConfig, Section, load_section
from streaming.records import Group
from streaming.rewards.function import FunctionSource
from streaming.rewards.loading import load_function
from tests.bench import table
from tests.builders import make_group, make_prompt
from tests.test_architecture import MAY_IMPORT

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
SMALL = ROOT / "deploy" / "configs" / "small.yaml"
QUOTED = re.findall(r"`([^`\n]+)`", README)


def example(language: str, number: int = 0) -> str:
    """The block of this number in this language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)[number]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The README's run.yaml beside the files that it names, with a model of ours."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "prompts.jsonl").write_text(example("json"))
    (folder / "heldout.jsonl").write_text(example("json"))
    (folder / "reward.py").write_text(example("python"))
    (folder / "run.yaml").write_text(example("yaml"))
    return load_config(folder / "run.yaml", [f"model={save_tiny_model(folder / 'model')}"])


def test_its_run_passes_what_is_checked_before_anything_starts(config: RunConfig) -> None:
    preflight(config)
    folder = Path(config.prompts.path).parent
    assert config.directory == str(folder / "runs" / "my-run")
    assert "streamdpo report runs/my-run" in README


def test_its_settings_of_a_cluster_are_settings(config: RunConfig) -> None:
    log = yaml.safe_load(example("yaml", 1))["log"]
    assert load_section(LogConfig, log, where="README").kafka.sasl_mechanism == "SCRAM-SHA-512"


def test_its_prompts_are_a_text_and_a_conversation_with_an_answer_each(config: RunConfig) -> None:
    text, conversation = read_prompts(config.prompts)
    assert text.text is not None and text.columns == {"answer": "42"}
    assert conversation.messages is not None and conversation.columns == {"answer": "13"}


def test_its_reward_function_rewards_right_answers_of_both_kinds(config: RunConfig) -> None:
    [source] = config.rewards
    function, version = load_function(source.function or "")
    correct = FunctionSource(function, name=source.name, version=version)
    for prompt in read_prompts(config.prompts):
        rewards = asyncio.run(correct.score(answered(prompt, [f"It is {prompt.columns['answer']}.", "7"])))
        assert [reward.value for reward in rewards] == [1.0, 0.0]
    correct.close()


def answered(prompt: Prompt, texts: list[str]) -> Group:
    request = make_prompt(text=prompt.text, messages=prompt.messages, columns=prompt.columns, num_candidates=len(texts))
    return make_group(texts, request=request)


def test_its_make_targets_are_there() -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)", README))
    assert targets >= {"demo", "test", "bench"}
    subprocess.run(["make", "--dry-run", *sorted(targets)], cwd=ROOT, capture_output=True, check=True)


def test_its_commands_are_there() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    named = set(re.findall(r"(?:^|^\.venv/bin/|`)streamdpo ([a-z]+)", README, flags=re.MULTILINE))
    assert named >= {"check", "run", "report", "schema", "status", "trace", "audit", "replay", "export", "redrive"}
    assert named <= commands


def test_its_modules_are_there() -> None:
    for module in re.findall(r"python -m ([\w.]+)", README):
        assert importlib.util.find_spec(module), module


def test_the_files_and_folders_that_it_names_are_there() -> None:
    files = {name for name in QUOTED if re.fullmatch(r"[a-z]+/[\w/]+\.(py|yaml)", name)}
    folders = set(re.findall(r"^ {4}([a-z]+)/ {2,}", README, flags=re.MULTILINE))
    assert "streaming/records.py" in files
    assert folders == {*MAY_IMPORT, "tests"}
    assert not [name for name in files | folders if not (ROOT / name).exists()]


def test_the_settings_that_it_names_are_there() -> None:
    settings = [name for name in QUOTED if re.fullmatch(r"[a-z]+(\.(?!(py|yaml|jsonl)$)[a-z_]+)+", name)]
    assert "scheduler.pipeline_depth" in settings
    for name in settings:
        section: type[Section] | None = RunConfig
        for part in name.split("."):
            assert section is not None and part in section.model_fields, name
            kind = section.model_fields[part].annotation
            section = kind if isinstance(kind, type) and issubclass(kind, Section) else None


def test_the_table_of_measurements_has_one_place() -> None:
    assert README.count(table.BEGIN) == README.count(table.END) == 1
    assert README.index(table.BEGIN) < README.index(table.END)


def test_small_yaml_loads(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(SMALL.read_text())
    config = load_config(tmp_path / "small.yaml")
    assert config.prompts.eval_path == str(tmp_path / "heldout.jsonl")


def test_what_small_yaml_has_commented_out_loads_too(tmp_path: Path) -> None:
    text, num_options = re.subn(r"^( *)# ([a-z_]+: [\d.e-]+)\b", r"\1\2", SMALL.read_text(), flags=re.MULTILINE)
    assert num_options == 2
    (tmp_path / "all.yaml").write_text(text)
    config = load_config(tmp_path / "all.yaml")
    assert (config.selection.sft_floor, config.stop.heldout_reward) == (0.5, 0.9)
