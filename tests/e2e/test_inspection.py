"""Every command that looks into a run's log, on a real run: while it goes on, and when it is over."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.config import load_run
from deploy.roles import open_run_log
from streaming import topics
from streaming.history import entries
from streaming.log.protocol import Output
from streaming.records import PromptRequest, decode
from tests.e2e.test_run import RUN_S, SETTINGS, pairs, started, state, until, write_run

pytestmark = pytest.mark.slow


def streamdpo(*arguments: object, code: int = 0) -> str:
    """What a command prints."""
    command = [sys.executable, "-c", "from deploy.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_each_command_answers_while_the_run_goes_on_and_when_it_is_over(tmp_path):
    path = write_run(tmp_path, scheduler={**SETTINGS["scheduler"], "max_requests": 120})
    run = tmp_path / "runs" / "mine"
    with started(path) as process:
        until(lambda: bool((found := state(run, "learner-0")) and found.numbers.get("step", 0) >= 6), process)
        with open_run_log(load_run(run)) as log:
            log.append([Output(topics.CANDIDATES.name, b"k", b"not a group")])
        look_into(run, tmp_path / "live")
        out, err = process.communicate(timeout=RUN_S)
    assert process.returncode == 0, err
    assert "end of data" in out
    assert "on their way: 0" in streamdpo("audit", run, "--final")
    look_into(run, tmp_path / "over")
    assert "goes back" in streamdpo("redrive", run, "--dry-run")
    assert "sent: 1" in streamdpo("redrive", run, "--reason", "not a Group", "--stage", "scorer")
    assert "it went before" in streamdpo("redrive", run)

    with open_run_log(load_run(run)) as log:
        assert list(log.newest(topics.BOOKS.name)) == [b"policy"], "the scheduler carried the balance when it ended"
        requests = [decode(PromptRequest, entry.value) for entry in entries(log, topics.PROMPTS.name)]
        for topic in (topics.PROMPTS.name, topics.FEEDBACK.name):
            log.trim(log.end_offsets(topic))
    after = streamdpo("audit", run, "--final")
    assert f"{len({request.number for request in requests})} requests of policy" in after
    assert "goes on from the balance carried at" in after


def look_into(run: Path, out: Path) -> None:
    """Trace, export and replay agree with each other about a run that may be going on."""
    streamdpo("audit", run)
    written = streamdpo("export", run, "--out", out / "pairs.jsonl")
    assert "pairs.jsonl: " in written
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    row = rows[-1]
    [found] = json.loads(streamdpo("trace", run, row["pair_id"], "--json"))
    assert (found["ending"], found["step"], found["request_number"]) == ("trained", row["step"], row["request_number"])
    assert found["request"]["text"] == row["prompt"]
    chosen = found["scored"]["group"]["candidates"][found["pair"]["chosen"]["candidate"]]
    assert chosen["text"] == row["chosen"]
    assert [hop["hop"] for hop in found["way"][:4]] == ["asked", "sampled", "scored", "paired"]
    assert f"step {row['step']}" in streamdpo("trace", run, row["request_number"])
    same = json.loads(streamdpo("replay", run, "--from", "candidates", "--json"))
    assert same["changes"] == []
    strict = json.loads(streamdpo("replay", run, "--from", "scored", "--set", "selection.min_margin=0.9", "--json"))
    assert strict["kinds"].keys() <= {"disappears", "other reason"}
    assert strict["kinds"]["disappears"] > 0
    assert len(pairs(run)) >= len(rows)
