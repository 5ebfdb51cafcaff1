"""`streamdpo run` on a person's own data, as they start it: a process, real Ray, engine, DeepSpeed and log."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.config import load_run
from deploy.promotion import version_directory
from deploy.roles import open_run_log
from deploy.tiny_model import save_tiny_model
from streaming import topics
from streaming.audit import audit_log
from streaming.heartbeat import role_states
from streaming.history import entries
from streaming.records import Feedback, Pair, RoleState, Version, decode

pytestmark = pytest.mark.slow

RUN_S = 240
"""Longest run of a test: a quiet machine takes half a minute."""

SETTINGS: dict[str, Any] = {
    "name": "mine",
    "model": "model",
    "prompts": {"path": "prompts.jsonl", "eval_path": "heldout.jsonl"},
    "rewards": [{"name": "digits", "function": "reward.py:score"}],
    "generation": {
        "concurrency": 8,
        "sampling": {"num_candidates": 4, "max_tokens": 8},
        "engine": {"kind": "transformers", "num_threads": 1, "max_model_len": 128},
    },
    "scheduler": {"pipeline_depth": 16, "eval_every": 4},
    "scoring": {"num_threads": 1},
    "learner": {
        "num_threads": 1,
        "optimizer": {"learning_rate": 1.0e-3, "warmup_steps": 2},
        "batch": {"batch_size": 4},
        "checkpoint": {"every_steps": 5},
    },
    "stop": {"max_minutes": 15},
}

DIGITS = (
    "def score(completions, **rest):\n"
    "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
    "    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in texts]\n"
)


def write_run(folder: Path, *, reward: str = DIGITS, chat: bool = False, **changed: Any) -> Path:
    """A person's model, data, reward function and settings."""
    save_tiny_model(folder / "model", chat_template=chat)
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(10) for b in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::10]))
    (folder / "reward.py").write_text(reward)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changed}))
    return path


@contextmanager
def started(path: Path, *overrides: str, session: bool = False) -> Iterator[subprocess.Popen[str]]:
    """`streamdpo run`, killed on the way out if it still runs; in a process group of its own where `session`."""
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "run", str(path)]
    for override in overrides:
        command += ["--set", override]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=path.parent, start_new_session=session
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # once asks for a clean stop, twice is in a hurry
            process.terminate()
        process.communicate(timeout=60)


def run(path: Path, *overrides: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a run that ends by itself."""
    with started(path, *overrides) as process:
        out, err = process.communicate(timeout=RUN_S)
        return process.returncode, out, err


def until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a running process; that it ends first fails."""
    limit_s = time.monotonic() + RUN_S
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit_s
        time.sleep(0.2)


def state(run_: Path, role_id: str) -> RoleState | None:
    if not (run_ / "log.db").exists():
        return None
    with open_run_log(load_run(run_)) as log:
        return role_states(log).get(role_id)


def feedback(run_: Path) -> list[Feedback]:
    with open_run_log(load_run(run_)) as log:
        return [decode(Feedback, entry.value) for entry in entries(log, topics.FEEDBACK.name)]


def pairs(run_: Path) -> list[Pair]:
    with open_run_log(load_run(run_)) as log:
        return [decode(Pair, entry.value) for entry in entries(log, topics.pairs("policy").name)]


def trained_twice(run_: Path) -> list[int]:
    with open_run_log(load_run(run_)) as log:
        return audit_log(log, policy="policy").ended_twice


def test_a_run_stopped_by_ctrl_c_goes_on_with_the_same_command_to_its_last_step(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, directory = write_run(tmp_path, learner={**SETTINGS["learner"], "max_steps": 40}), tmp_path / "runs" / "mine"
    checkpoints = directory / "checkpoints" / "policy"
    with started(path) as process:
        until(lambda: (state(directory, "learner-0") or RoleState(**_NOBODY)).numbers.get("step", 0) >= 3, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, err
    assert "stopped by a signal" in out
    first = state(directory, "learner-0")
    assert first is not None and first.health == "stopped"
    committed = f"epoch-1/step-{first.numbers['step']:.0f}/manifest.json"
    assert committed in [str(p.relative_to(checkpoints)) for p in checkpoints.rglob("manifest.json")], (first, out)

    code, out, err = run(path, "learner.publish.keep=2")
    assert code == 0, err
    assert "changed since the last start: learner.publish.keep: 3 -> 2" in out
    assert "the learner has taken its 40 steps" in out
    second = state(directory, "learner-0")
    assert second is not None and second.version is not None
    assert (second.version.epoch, second.numbers["step"]) == (2, 40)
    assert trained_twice(directory) == []
    measured = {f.version for f in feedback(directory) if f.ending == "evaluated"}
    assert {Version(1, 0), second.version} <= measured, "the first and the last version are measured"
    assert not version_directory(directory, "policy", Version(1, 1)).exists(), "old versions go, the best one stays"
    best = Version(*map(int, out.split("best version ")[1].split(":")[0].split(".")))
    manifest = json.loads((directory / "best" / "manifest.json").read_text())
    assert manifest["version"] == {"epoch": best.epoch, "number": best.number}
    for kept in ("best", "last"):
        AutoModelForCausalLM.from_pretrained(directory / kept)
        AutoTokenizer.from_pretrained(directory / kept)
    assert "<html" in (directory / "report.html").read_text()


def test_a_signal_to_the_whole_process_group_lets_the_learner_write_its_checkpoint(tmp_path):
    """As `timeout` and supervisors send it: Ray's daemons, which stand in the group, must outlive the roles."""
    path, directory = write_run(tmp_path), tmp_path / "runs" / "mine"
    with started(path, session=True) as process:
        until(lambda: (state(directory, "learner-0") or RoleState(**_NOBODY)).numbers.get("step", 0) >= 3, process)
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, err
    assert "stopped by a signal" in out
    assert "did not end well" not in out
    last = state(directory, "learner-0")
    assert last is not None
    committed = directory / "checkpoints" / "policy" / "epoch-1" / f"step-{last.numbers['step']:.0f}" / "manifest.json"
    assert committed.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_starts_ends_the_run_cleanly(tmp_path, number):
    """It used to end in Ray's native stack trace, or without a word."""
    with started(write_run(tmp_path)) as process:
        assert process.stdout is not None
        while "starting 5 processes" not in (line := process.stdout.readline()):
            assert line, "it ended before it began"
        process.send_signal(number)
        out, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, err
    assert "stopped by a signal" in out


_NOBODY: dict[str, Any] = {"role": "learner", "role_id": "learner-0", "pid": 0, "host": "", "time_s": 0.0}


def test_conversations_from_parquet_run_on_vllm_to_the_end_of_the_data(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path, directory = write_run(tmp_path, chat=True), tmp_path / "runs" / "mine"
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1="}], "topic": "sums"} for n in range(30)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "prompts.parquet")
    code, out, err = run(
        path,
        "prompts.path=prompts.parquet",
        "prompts.max_passes=1",
        "generation.engine.kind=vllm",
        "generation.engine.kv_cache_bytes=67108864",
    )
    assert code == 0, err
    assert "end of data" in out
    assert trained_twice(directory) == []
    train = [f for f in feedback(directory) if f.round is None]
    assert {f.request_number for f in train if f.ending in ("trained", "dropped")} == {f.request_number for f in train}
    assert len({f.request_number for f in train}) == 30, "every prompt of the data came to its end"
    assert pairs(directory)[0].prompt_text


def test_two_ranks_train_together(tmp_path):
    code, out, err = run(write_run(tmp_path), "learner.world_size=2", "learner.zero_stage=2", "learner.max_steps=3")
    assert code == 0, err
    assert "the learner has taken its 3 steps" in out


def test_rewards_that_fail_while_it_runs_are_missing_and_the_person_is_told(tmp_path):
    """The trial's answers are judged well; what the model writes is not."""
    reward = (
        "def score(completions, **rest):\n"
        "    if completions[0] == '42':\n"
        "        return [0.0] * len(completions)\n"
        "    raise ValueError('bad weather')\n"
    )
    path, directory = write_run(tmp_path, reward=reward), tmp_path / "runs" / "mine"
    code, out, err = run(path, "scheduler.max_requests=40", "prompts.eval_path=null")
    assert code == 0, err
    assert "have no reward and teach nothing" in out
    assert {(f.ending, f.reason) for f in feedback(directory)} == {("dropped", "reward_missing")}
    assert "bad weather" in (directory / "logs" / "scorer-0.log").read_text()


def test_the_directory_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    path, directory = write_run(tmp_path), tmp_path / "runs" / "mine"
    (directory / "weights").mkdir(parents=True)  # it has begun
    (directory / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "model": "another/model"}))
    before = (directory / "config.yaml").read_text()
    code, _, err = run(path)
    assert code == 2
    assert "holds another run: model was 'another/model'" in err
    assert (directory / "config.yaml").read_text() == before
