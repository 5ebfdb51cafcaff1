"""A learner stands still for a while, its heir takes over, and it wakes in the middle of anything: nobody follows it.

The zombie stops itself (SIGSTOP) at an exact moment: before a file operation, or before an append to the log.
"""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.reading import WeightsReader
from deploy.tiny_model import save_tiny_model
from learner import checkpoint
from learner.claim import newest_version
from streaming import topics
from streaming.audit import audit, audit_log
from streaming.fencing import read_fences
from streaming.heartbeat import role_states
from streaming.history import entries
from streaming.records import Feedback, Version, decode
from streaming.weights import verify
from tests.builders import make_prompt
from tests.learner_process import (
    NUM_TRAINED,
    PATIENCE_S,
    SETTINGS,
    feedback,
    logs,
    open_run,
    record,
    recorded_pairs,
    start,
    started_from,
    until_frozen,
    wait,
)

pytestmark = [pytest.mark.slow, pytest.mark.fault("freeze: learner (DeepSpeed)", backend="sqlite")]

MOMENTS = {
    "writing a checkpoint": ("open", r"epoch-1/step-6/state\.msgpack"),
    "committing a checkpoint": ("os.rename", r"epoch-1/step-6/manifest\.json'"),
    "telling what a checkpoint holds": ("append", "trained in step 6"),
    "removing an old checkpoint": ("os.remove", r"epoch-1/step-3/manifest\.json"),
    "beginning to write a version": ("os.mkdir", r"weights/policy/1\.2"),
    "committing a version": ("os.rename", r"weights/policy/1\.2/manifest\.json'"),
    "announcing a version": ("append", r"version 1\.2"),
    "removing an old version": ("shutil.rmtree", r"weights/policy/1\.0'"),
    "telling what a step took": ("append", "consumed in step 5"),
    "beating": ("append", "beat ready at step 0"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture
def run(tmp_path):
    record(tmp_path, *recorded_pairs())
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """The parameters of a learner that was never disturbed."""
    run = tmp_path_factory.mktemp("uninterrupted")
    record(run, *recorded_pairs())
    assert wait(start(run, model, SETTINGS)) == 0, logs(run)
    return parameters(run)


def parameters(run):
    with open_run(run) as log:
        return load_file(Path(newest_version(log, "policy").location) / "model.safetensors")


def frozen(run, model, moment, settings=SETTINGS):
    """A learner that stands still at this moment."""
    process = start(run, model, settings, freeze_at=moment)
    until_frozen(process)
    return process


def wake(process):
    """Let it go on; returns its exit code."""
    os.kill(process.pid, signal.SIGCONT)
    return wait(process)


def wait_for(run, process, holds):
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert process.is_alive() and time.monotonic() < deadline, logs(run)
        process.join(0.005)


def version(run):
    with open_run(run) as log:
        newest = newest_version(log, "policy")
    return newest.version if newest else Version(0, 0)


def counted(run):
    """Feedback that counts: without what is void."""
    with open_run(run) as log:
        fences = read_fences(log)
        found = [(entry, decode(Feedback, entry.value)) for entry in entries(log, topics.FEEDBACK.name)]
    return [one for entry, one in found if not fences.is_void(one, entry)]


def assert_whole(run, uninterrupted):
    """Everything was trained once, by one line of epochs, and came to what an undisturbed learner comes to."""
    found = counted(run)
    trained = {(one.step, one.request_number, one.index) for one in found if one.ending == "trained"}
    assert len(trained) == len({(number, index) for _, number, index in trained}) == NUM_TRAINED, logs(run)
    requests = [make_prompt(number) for number in {one.request_number for one in found}]
    balance = audit(requests, found, policy="policy")
    assert not balance.ended_twice and not balance.not_ended
    with open_run(run) as log:
        assert audit_log(log, policy="policy").ended_twice == []
    ours = parameters(run)
    for name, tensor in uninterrupted.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


async def followed(run):
    """The version that a generator takes which starts now."""
    with open_run(run) as log:
        reader = WeightsReader(log, "policy")
        newest = await reader.next()
        await reader.close()
        return newest


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
async def test_a_learner_that_wakes_when_its_heir_is_done_changes_nothing(run, model, uninterrupted, moment):
    zombie = frozen(run, model, moment)
    assert wait(start(run, model, SETTINGS)) == 0, logs(run)
    before = of_the_heir(run)
    assert wake(zombie) == 1
    assert "epoch 2 of this policy is running, this is epoch 1" in logs(run)
    assert of_the_heir(run) == before
    assert_whole(run, uninterrupted)
    newest = await followed(run)
    assert newest.version.epoch == 2
    verify(Path(newest.location), newest.manifest_sha256)
    with open_run(run) as log:
        state = role_states(log)["learner-0"]
    assert (state.epoch, state.health, state.message) == (2, "stopped", "max_steps")
    assert checkpoint.newest(run / "checkpoints" / "policy").state.version.epoch == 2


def of_the_heir(run):
    """Its files and their contents, and the checkpoint that it began with."""
    origin = "epoch-1/step-3"
    parts = ("/epoch-2/", "/weights/policy/2.", f"/{origin}/" if started_from(run, 2) == origin else "/epoch-2/")
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and any(p in str(path) for p in parts)}


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_that_a_zombie_commits_late_is_never_restored(run, model, uninterrupted, keep):
    """The heir dies before it has a checkpoint of its own: the zombie's is the newest, and of no ancestor."""
    settings = {**SETTINGS, "checkpoint": {"every_steps": 3, "keep": keep}}
    zombie = frozen(run, model, MOMENTS["committing a checkpoint"], settings)
    heir = start(run, model, {**settings, "checkpoint": {"every_steps": 1000}, "max_steps": 1000})
    wait_for(run, heir, lambda: version(run) >= Version(2, 4))
    heir.kill()
    assert wait(heir) == -signal.SIGKILL
    assert wake(zombie) == 1
    assert (run / "checkpoints/policy/epoch-1/step-6" / checkpoint.MANIFEST).exists()
    assert wait(start(run, model, settings)) == 0, logs(run)
    assert started_from(run, 2) == started_from(run, 3) == "epoch-1/step-3"
    assert_whole(run, uninterrupted)


def test_what_a_zombie_tells_late_of_its_steps_counts_for_nobody(run, model, uninterrupted):
    """It stood still between the commit of a checkpoint, which its heir starts from, and telling what that holds."""
    zombie = frozen(run, model, MOMENTS["telling what a checkpoint holds"])
    assert wait(start(run, model, SETTINGS)) == 0, logs(run)
    assert started_from(run, 2) == "epoch-1/step-6"
    everything = feedback(run, "trained")
    assert wake(zombie) == 1
    late = [one for one in feedback(run, "trained") if one not in everything]
    assert len(late) == 3 * 5
    assert not [one for one in counted(run) if one in late]
    assert_whole(run, uninterrupted)


def test_of_two_learners_that_start_at_once_one_goes_on(run, model, uninterrupted):
    both = [start(run, model, SETTINGS) for _ in range(2)]
    assert sorted(wait(one) for one in both) == [0, 1], logs(run)
    assert "of this policy is running" in logs(run)
    assert_whole(run, uninterrupted)
