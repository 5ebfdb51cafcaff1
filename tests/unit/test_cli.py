"""The command line as a person meets it: exit codes and texts, without starting a role."""

import json
import signal
from pathlib import Path

import pytest
import yaml

from deploy.cli import execute
from deploy.config import load_config, save_config
from deploy.roles import open_run_log
from deploy.tiny_model import save_tiny_model
from streaming import topics
from streaming.log.protocol import Output
from streaming.records import Record, encode
from streaming.stage import dead_letter
from tests.builders import LEAST, make_entry, make_feedback, make_pair, make_prompt, make_role

GOOD_REWARD = "def score(completions, **rest):\n    return [len(c) for c in completions]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "model", chat_template=False)


def write_run(
    folder: Path,
    model: Path,
    *,
    prompts: str = '{"prompt": "1+1="}\n',
    reward: str = GOOD_REWARD,
    changed: dict | None = None,
) -> Path:
    """A person's files: settings, prompts and a reward function."""
    (folder / "prompts.jsonl").write_text(prompts)
    (folder / "reward.py").write_text(reward)
    settings = {
        **LEAST,
        "model": str(model),
        "generation": {"engine": {"kind": "transformers"}},
        **(changed or {}),
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def recorded(folder: Path, model: Path, topic: str, *records: Record) -> str:
    """The directory of a run whose log holds these records."""
    config = load_config(write_run(folder, model))
    with open_run_log(config) as log:
        log.append([Output(topic, b"key", encode(record)) for record in records])
    save_config(config, folder / "runs" / "mine" / "config.yaml")
    return str(folder / "runs" / "mine")


MESSAGES = json.dumps({"prompt": [{"role": "user", "content": "Hi"}]})
MISTAKES: dict[str, tuple[dict, int, str]] = {
    "a wrong path": ({"changed": {"prompts": {"path": "nowhere.jsonl"}}}, 2, "nowhere.jsonl: does not exist"),
    "an empty file": ({"prompts": ""}, 2, "prompts.jsonl: holds no prompts"),
    "a malformed line": ({"prompts": '{"prompt": "a"}\n{"prompt": \n'}, 2, "prompts.jsonl:2: is not JSON"),
    "no prompt column": ({"prompts": '{"question": "a"}\n'}, 2, "its columns are: question"),
    "malformed messages": ({"prompts": '{"prompt": ["Hi"]}\n'}, 2, "prompts.jsonl:1: prompt[0] is 'Hi', not a message"),
    "no chat template": ({"prompts": MESSAGES}, 2, "the prompts are messages, but the model's tokenizer has no chat"),
    "a reward that raises": (
        {"reward": "def score(completions, **rest):\n    return [1 / 0]\n"},
        2,
        "raised ZeroDivisionError: division by zero (at ",
    ),
    "a reward with the wrong count": (
        {"reward": "def score(completions, **rest):\n    return [1.0]\n"},
        2,
        "returned 1 rewards for 2 completions",
    ),
    "a reward that is NaN": (
        {"reward": "def score(completions, **rest):\n    return [float('nan')] * len(completions)\n"},
        2,
        "returned nan",
    ),
    "a reward that does not import": ({"reward": "import nothing_like_this\n"}, 2, "nothing_like_this"),
    "a reward file that is not there": (
        {"changed": {"rewards": [{"name": "a", "function": "other.py:score"}]}},
        2,
        "other.py",
    ),
    "an unknown setting": ({"changed": {"learnr": {}}}, 2, "Did you mean 'learner'?"),
    "a model that is not there": ({"changed": {"model": "./nowhere"}}, 3, "nowhere: is not a directory"),
}


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_persons_own_data_is_named_before_anything_starts(tmp_path, model, capsys, mistake, command):
    given, code, text = MISTAKES[mistake]
    path = write_run(tmp_path, model, **given)
    assert execute([command, str(path)]) == code
    printed = capsys.readouterr()
    assert text in printed.out + printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "runs").exists()


def test_a_check_says_ok_line_by_line_and_exits_with_0(tmp_path, model, capsys):
    assert execute(["check", str(write_run(tmp_path, model))]) == 0
    printed = capsys.readouterr().out
    assert "ok    prompts: 1 texts" in printed
    assert "ok    reward length: gave 2, 19 on trial" in printed


def test_a_missing_file_of_settings_exits_with_2(tmp_path, capsys):
    assert execute(["run", str(tmp_path / "nowhere.yaml")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["walk"], ["run"], ["run", "a.yaml", "--sat", "b"]])
def test_bad_usage_exits_with_2(arguments):
    assert execute(arguments) == 2


def test_an_unknown_role_exits_with_2(tmp_path, model, capsys):
    assert execute(["role", "janitor", str(write_run(tmp_path, model))]) == 2
    assert "It has: generator-0, learner-0, scorer-0, selector-0, scheduler-0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_run_that_never_was_has_nothing_to_show(tmp_path, model, capsys, command):
    """A report said that the path of a YAML file was missing, to somebody who had just given one."""
    assert execute([command, str(write_run(tmp_path, model))]) == 2
    assert "nothing has run there yet" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_status_shows_every_role(tmp_path, model, capsys):
    states = [make_role("learner", health="stopped", numbers={"step": 7.0}), make_role("scorer", time_s=5.0)]
    config = load_config(write_run(tmp_path, model))
    with open_run_log(config) as log:
        log.append([Output(topics.ROLES.name, state.role_id.encode(), encode(state)) for state in states])
    save_config(config, tmp_path / "runs" / "mine" / "config.yaml")
    assert execute(["status", str(tmp_path / "runs" / "mine")]) == 0
    printed = capsys.readouterr().out
    assert "learner-0  stopped" in printed
    assert "step 7" in printed
    assert "silent" in printed


def test_tail_shows_the_newest_entries_as_json(tmp_path, model, capsys):
    run = recorded(tmp_path, model, topics.PROMPTS.name, *(make_prompt(n) for n in range(5)))
    assert execute(["tail", "prompts", run, "-n", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["number"] for line in lines] == [3, 4]
    assert lines[0]["text"] == "3+1="


def test_tail_shows_only_the_fields_that_are_asked_for(tmp_path, model, capsys):
    run = recorded(tmp_path, model, topics.PROMPTS.name, make_prompt(7, columns={"answer": [1, 2]}))
    assert execute(["tail", "prompts", run, "--field", "columns.answer.1", "--field", "nothing.here"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert {name: line[name] for name in line if name not in ("at", "time", "key")} == {
        "columns.answer.1": 2,
        "nothing.here": None,
    }


def test_tail_shows_what_is_no_record_and_goes_on(tmp_path, model, capsys):
    """One such entry ended it with exit code 1, and what came after it was never seen."""
    run = recorded(tmp_path, model, topics.PROMPTS.name, make_prompt(0))
    with open_run_log(load_config(tmp_path / "run.yaml")) as log:
        log.append([Output(topics.PROMPTS.name, b"key", b"\xff")])
    recorded(tmp_path, model, topics.PROMPTS.name, make_prompt(2))
    assert execute(["tail", "prompts", run]) == 0
    first, junk, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["number"], last["number"]) == (0, 2)
    assert junk["at"].endswith("@1")
    assert junk["unreadable"].startswith("not a PromptRequest")


def test_only_a_tail_that_follows_takes_ctrl_c_for_its_end(tmp_path, model):
    """Without -f it was deaf to Ctrl-C, however long it read."""
    run = recorded(tmp_path, model, topics.PROMPTS.name, make_prompt(0))
    before = signal.getsignal(signal.SIGINT)
    assert execute(["tail", "prompts", run]) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_tail_names_the_topics_where_one_is_wrong(tmp_path, model, capsys):
    run = recorded(tmp_path, model, topics.PROMPTS.name, make_prompt())
    assert execute(["tail", "promts", run]) == 2
    assert "candidates, dead-letter, feedback, pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("endings", "arguments", "code", "text"),
    [
        ([make_feedback(0), make_feedback(1, ending="dropped", reason="tie")], ["--final"], 0, "dropped (tie): 1"),
        ([make_feedback(0)], [], 0, "on their way: 1"),
        ([make_feedback(0)], ["--final"], 1, "on their way: 1 (requests 1)"),
        ([make_feedback(0, step=1), make_feedback(0, step=2), make_feedback(1)], [], 1, "ended twice: 1 (requests 0)"),
    ],
)
def test_the_audit_balances_or_says_why_not(tmp_path, model, capsys, endings, arguments, code, text):
    run = recorded(tmp_path, model, topics.PROMPTS.name, make_prompt(0), make_prompt(1))
    recorded(tmp_path, model, topics.FEEDBACK.name, *endings)
    assert execute(["audit", run, *arguments]) == code
    assert text in capsys.readouterr().out


def test_a_trace_of_an_unknown_id_exits_with_2_and_says_what_to_give(tmp_path, model, capsys):
    run = recorded(tmp_path, model, topics.PROMPTS.name, make_prompt(0))
    assert execute(["trace", run, "ffff"]) == 2
    assert "no pair, group or request 'ffff'" in capsys.readouterr().err
    assert execute(["trace", run, "0"]) == 0
    assert "on its way, last seen in asked" in capsys.readouterr().out


def test_a_policy_that_the_run_does_not_have_is_refused(tmp_path, model, capsys):
    run = recorded(tmp_path, model, topics.PROMPTS.name, make_prompt(0))
    assert execute(["export", run, "--out", str(tmp_path / "out"), "--policy", "b"]) == 2
    assert "It has: policy." in capsys.readouterr().err


def test_an_export_of_nothing_says_so_and_writes_nothing(tmp_path, model, capsys):
    run = recorded(tmp_path, model, topics.pairs("policy").name, make_pair())
    assert execute(["export", run, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "left out: 1 pairs that no durable step has trained" in printed
    assert "nothing to write" in printed
    assert not (tmp_path / "out").exists()


def test_a_dry_redrive_shows_and_sends_nothing(tmp_path, model, capsys):
    run = recorded(tmp_path, model, topics.PROMPTS.name, make_prompt(0))
    letter = dead_letter(make_entry(b"junk", topic="pairs.policy"), "RecordError: [bad]", "learner")
    with open_run_log(load_config(tmp_path / "run.yaml")) as log:
        log.append([letter])
    assert execute(["redrive", run, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "RecordError: [bad]" in printed
    assert "sent:" not in printed
    assert execute(["redrive", run, "--since", "1h", "--stage", "scorer"]) == 0
    assert "no dead letters like that" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["audit"], ["trace", "0"], ["redrive"], ["export", "--out", "o"], ["status"]])
def test_a_log_that_is_torn_is_told_without_a_traceback(tmp_path, model, capsys, command):
    run = recorded(tmp_path, model, topics.PROMPTS.name, *(make_prompt(number) for number in range(500)))
    file = Path(run) / "log.db"
    file.write_bytes(file.read_bytes()[:8192] + b"\xff" * 40_000)
    for rest in ("log.db-wal", "log.db-shm"):
        (Path(run) / rest).unlink(missing_ok=True)
    assert execute([command[0], run, *command[1:]]) == 1
    printed = capsys.readouterr().err
    assert "log.db" in printed
    assert "Traceback" not in printed


def test_the_schema_is_json(capsys):
    assert execute(["schema"]) == 0
    assert "learner" in json.loads(capsys.readouterr().out)["properties"]
