"""The learner alone, over a recorded log: real DeepSpeed, real processes, real kills."""

import json
import os
import random
import shutil
import signal
import socket
import time
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from deploy.config import load_config
from deploy.recover import recover
from deploy.tiny_model import save_tiny_model
from learner import checkpoint, claim
from streaming import topics
from streaming.heartbeat import role_states
from streaming.log.protocol import Output
from streaming.records import Version, encode
from streaming.weights import verify
from tests.builders import make_pair, make_response, make_role, make_weights
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

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=True)


@pytest.fixture
def run(tmp_path):
    record(tmp_path, *recorded_pairs())
    return tmp_path


def start_ranks(run, model, settings, world_size):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(run, model, settings, rank=rank, world_size=world_size, port=port) for rank in range(world_size)]


def train(run, model, settings=SETTINGS, *, world_size=1):
    """Train to the end, and return every rank's exit code."""
    return [wait(process) for process in start_ranks(run, model, settings, world_size)]


def newest_weights(run):
    with open_run(run) as log:
        return claim.newest_version(log, "policy")


def parameters(run):
    return load_file(Path(newest_weights(run).location) / "model.safetensors")


def trained(run):
    """(step, request number, index) of everything trained, once per example."""
    return sorted({(one.step, one.request_number, one.index) for one in feedback(run, "trained")})


def kill(process, *, after_s=0.0):
    """SIGKILL, unless it ends by itself before."""
    process.join(after_s)
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    record(run, *recorded_pairs())
    assert train(run, model) == [0], logs(run)
    return run


def test_every_pair_ends_once_and_the_run_says_why_it_stopped(uninterrupted):
    assert {(one.request_number, one.reason) for one in feedback(uninterrupted, "dropped")} == {
        (20, "too_long"),
        (30, "stale"),
    }
    everything = trained(uninterrupted)
    assert len(everything) == len({(number, index) for _, number, index in everything}) == NUM_TRAINED
    seen = [pair for pair in recorded_pairs() if pair.route == "dpo" and pair.request_number not in (20, 30)]
    num_unrated = sum(pair.rating_gap is None for pair in seen)
    assert f"pairs without rating: {num_unrated:.1f}" in logs(uninterrupted)
    with open_run(uninterrupted) as log:
        state = role_states(log)["learner-0"]
    assert (state.health, state.message, state.numbers["step"]) == ("stopped", "max_steps", 12)


def test_a_published_version_is_a_model_that_loads_and_has_the_probes_log_probs(uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from streaming.logprobs import sequence_logprobs

    newest = newest_weights(uninterrupted)
    assert verify(Path(newest.location), newest.manifest_sha256).version == newest.version == Version(1, 6)
    loaded = AutoModelForCausalLM.from_pretrained(newest.location)
    probe = newest.probe
    [logprobs] = sequence_logprobs(loaded, [(probe.prompt_tokens, probe.response_tokens)])
    assert logprobs == pytest.approx(probe.logprobs, abs=1e-5)
    assert AutoTokenizer.from_pretrained(newest.location).chat_template


def test_the_initial_weights_are_published_before_the_first_pair_comes(tmp_path, model):
    record(tmp_path)
    process = start(tmp_path, model, SETTINGS)
    wait_for_version(tmp_path, process, lambda version: version == Version(1, 0))
    process.terminate()
    assert wait(process) == 0
    first = newest_weights(tmp_path)
    assert (first.version, first.step, first.lineage, first.probe) == (Version(1, 0), 0, [], None)
    assert_same(parameters(tmp_path), load_file(model / "model.safetensors"))


def test_only_the_newest_versions_stay_on_disk(uninterrupted):
    kept = sorted(path.name for path in (uninterrupted / "weights" / "policy").iterdir())
    assert kept == ["1.4", "1.5", "1.6"]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.fault("kill: learner (DeepSpeed)", backend="sqlite")
def test_a_learner_killed_anywhere_and_resumed_is_one_that_was_never_killed(run, model, uninterrupted, seed):
    """At a moment of three steps: before the first checkpoint, and behind two later ones."""
    rng = random.Random(seed)
    for first in (1, 4, 8):
        step = rng.randrange(first, first + 3)
        process = start(run, model, SETTINGS, freeze_at=("append", rf"consumed in step {step}\b"))
        until_frozen(process)
        os.kill(process.pid, signal.SIGCONT)
        kill(process, after_s=rng.uniform(0, 0.1))
    assert train(run, model) == [0], logs(run)
    third, fourth = (float(started_from(run, epoch).rpartition("step-")[2]) for epoch in (3, 4))
    assert third >= 3 and fourth >= 6
    assert trained(run) == trained(uninterrupted)
    assert_same(parameters(run), parameters(uninterrupted))


def wait_for_version(run, process, is_awaited):
    """Return once the newest published version is what is awaited."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_awaited(newest_version(run)):
        assert process.is_alive() and time.monotonic() < deadline, logs(run)
        process.join(0.005)


def newest_version(run):
    newest = newest_weights(run)
    return newest.version if newest else Version(0, 0)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def test_a_stopped_learner_loses_no_step_and_goes_on_from_there(run, model, uninterrupted):
    process = start(run, model, SETTINGS)
    wait_for_version(run, process, lambda version: version >= Version(1, 2))
    process.terminate()
    assert wait(process) == 0
    consumed = {(one.step, one.request_number, one.index) for one in feedback(run, "consumed") if not one.reason}
    assert consumed == set(trained(run))
    assert train(run, model) == [0]
    assert_same(parameters(run), parameters(uninterrupted))


def test_a_restart_takes_the_next_epoch_and_publishes_what_it_restored(run, model):
    """What the second start published after the only checkpoint has no descendants."""
    settings = {**SETTINGS, "max_steps": 4, "publish": {"sync_every": 1}}
    assert train(run, model, settings) == [0]
    assert newest_version(run) == Version(1, 4)
    saved = parameters(run)
    process = start(run, model, {**settings, "max_steps": 9, "checkpoint": {"every_steps": 100}})
    wait_for_version(run, process, lambda version: version >= Version(2, 6))
    kill(process)
    assert {one.epoch for one in feedback(run, "consumed")} == {1, 2}
    assert {one.epoch for one in feedback(run, "trained")} == {1}  # what no checkpoint holds is not trained
    assert train(run, model, settings) == [0]
    restored = newest_weights(run)
    assert (restored.version, restored.step) == (Version(3, 4), 4)
    assert restored.lineage == [Version(1, 4), Version(2, 4)]
    assert_same(parameters(run), saved)


def announce(run, version):
    """As an earlier start of the learner did."""
    with open_run(run) as log:
        log.append([Output(topics.WEIGHTS.name, b"policy/full", encode(make_weights(version)))])


def test_a_checkpoint_is_not_gone_on_from_with_another_log(uninterrupted, model, tmp_path):
    """Its offsets would lead into the middle of other records, and numbers that are settled would come again."""
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    record(tmp_path, *recorded_pairs())
    assert train(tmp_path, model) == [1]
    assert "the log knows nothing of epoch 1" in logs(tmp_path)
    assert "streamdpo recover" in logs(tmp_path)


def test_a_run_whose_log_is_lost_goes_on_from_its_checkpoint_in_a_new_one(run, model):
    settings = {**SETTINGS, "max_steps": 4}
    assert train(run, model, settings) == [0]
    before = {number for _, number, _ in trained(run)}
    for path in run.glob("log.db*"):
        path.unlink()
    (run / "run.yaml").write_text(
        "{name: run, directory: ., model: m, prompts: {path: p.jsonl}, rewards: [{name: a, function: a:b}]}"
    )
    [found] = recover(load_config(run / "run.yaml"))
    assert (found.step, found.next_number) == (4, max(before) + 1)
    again = [pair for pair in recorded_pairs() if pair.request_number in before]
    record(run, *again, *(make_pair(found.next_number + i) for i in range(10)))
    assert train(run, model, {**settings, "max_steps": 6}) == [0], logs(run)
    later = {number for step, number, _ in trained(run) if step > 4}
    assert later == {found.next_number + i for i in range(10)}
    assert newest_version(run).epoch == 3


def test_endings_that_a_crash_kept_from_the_log_are_written_by_the_next_start(uninterrupted, model, tmp_path):
    """The log of the copied run has only pairs and a version, as if the crash came right after the checkpoint."""
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    announce(tmp_path, Version(1, 6))
    record(tmp_path, *recorded_pairs())
    assert train(tmp_path, model) == [0], logs(tmp_path)
    newest_batches = [one for one in trained(uninterrupted) if one[0] > 9]
    assert trained(tmp_path) == newest_batches


def test_a_learner_that_was_overtaken_by_a_newer_start_stops(tmp_path, model):
    process = start(tmp_path, model, SETTINGS)
    wait_for_version(tmp_path, process, lambda version: version == Version(1, 0))
    with open_run(tmp_path) as log:
        log.append([Output(topics.WEIGHTS.name, b"policy/full", encode(make_weights(Version(9, 0))))])
    record(tmp_path, *recorded_pairs())
    assert wait(process) == 1
    assert "epoch 9 of this policy is running" in logs(tmp_path)
    assert feedback(tmp_path, "trained") == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"zero_stage": 2}, "the settings say"),
        ({"batch": {"max_length": 5000}}, "5000 is more than the model takes (512)"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_checkpoint_are_refused(
    uninterrupted, model, tmp_path, changes, problem
):
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    announce(tmp_path, Version(1, 6))
    assert train(tmp_path, model, {**SETTINGS, **changes}) == [1]
    assert problem in logs(tmp_path)


def test_pairs_written_again_and_groups_sampled_again_are_not_trained_twice(run, model):
    settings = {**SETTINGS, "max_steps": 4}
    assert train(run, model, settings) == [0]
    before = trained(run)
    pairs = {pair.request_number: pair for pair in recorded_pairs()}
    done = [number for _, number, _ in before]
    again = [pairs[number] for number in done]
    sampled_again = [msgspec.structs.replace(pair, content_hash="sampled again") for pair in again]
    record(run, *again, *sampled_again)
    assert train(run, model, {**settings, "max_steps": 12}) == [0]
    numbers = [(number, index) for _, number, index in trained(run)]
    assert len(numbers) == len(set(numbers)) == NUM_TRAINED


def test_the_end_of_the_data_trains_the_last_partial_batch(run, model):
    settings = {**SETTINGS, "max_steps": 3, "batch": {"batch_size": 25}}
    with open_run(run) as log:
        numbers = {"exhausted": 1.0, "outstanding": 10.0, "issued": 61.0}
        state = make_role("scheduler", numbers=numbers, time_s=time.time())
        log.append([Output(topics.ROLES.name, state.role_id.encode(), encode(state))])
    assert train(run, model, settings) == [0]
    assert [step for step, _, _ in trained(run)].count(3) == 10


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_ranks_train_what_one_trains(run, model, uninterrupted, zero_stage):
    assert train(run, model, {**SETTINGS, "zero_stage": zero_stage}, world_size=2) == [0, 0], logs(run)
    assert trained(run) == trained(uninterrupted)
    assert_close(parameters(run), parameters(uninterrupted))


def assert_close(ours, theirs):
    """Equal but for the order of floating-point sums, which AdamW's first steps amplify."""
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.fault("kill: learner (DeepSpeed)", backend="sqlite")
def test_two_ranks_killed_and_resumed_are_two_that_were_never_killed(run, model, tmp_path_factory):
    settings = {**SETTINGS, "zero_stage": 2}
    whole = tmp_path_factory.mktemp("whole")
    record(whole, *recorded_pairs())
    assert train(whole, model, settings, world_size=2) == [0, 0], logs(whole)
    processes = start_ranks(run, model, settings, 2)
    wait_for_version(run, processes[0], lambda version: version >= Version(1, 3))
    kill(processes[1])
    processes[0].join(PATIENCE_S)
    assert processes[0].exitcode == 1  # it saw that its peer was gone, and did not wait for ever
    assert train(run, model, settings, world_size=2) == [0, 0], logs(run)
    assert trained(run) == trained(whole)
    assert_same(parameters(run), parameters(whole))


def broken_gradient(number):
    """A pair whose loss and gradient are infinite in float32."""
    return msgspec.structs.replace(make_pair(number, chosen="1"), weight=1e39)


def broken_loss(number):
    """A pair whose loss is infinite in float32, but not its gradient."""
    return msgspec.structs.replace(make_pair(number), chosen=make_response("1", reference_logprob=1e39))


@pytest.mark.parametrize(
    ("zero_stage", "broken"), [(0, broken_gradient), (0, broken_loss), (2, broken_loss), (3, broken_gradient)]
)
def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    tmp_path, model, uninterrupted, zero_stage, broken
):
    """The broken batch is settled as non_finite, and the parameters are those of a run that never saw it."""
    record(tmp_path, broken(-1), *(make_pair(number, rating_gap=1e4) for number in range(-5, -1)), *recorded_pairs())
    assert train(tmp_path, model, {**SETTINGS, "zero_stage": zero_stage}, world_size=2) == [0, 0], logs(tmp_path)
    dropped = {one.request_number for one in feedback(tmp_path, "dropped") if one.reason == "non_finite"}
    assert dropped == {-1, -2, -3, -4, -5}
    assert trained(tmp_path) == trained(uninterrupted)
    assert_close(parameters(tmp_path), parameters(uninterrupted))


def test_three_steps_in_a_row_that_are_not_finite_stop_the_run_with_the_checkpoint_intact(tmp_path, model):
    settings = {**SETTINGS, "batch": {"batch_size": 2}, "checkpoint": {"every_steps": 1}}
    record(tmp_path, *(make_pair(number) for number in range(4)), *(broken_loss(number) for number in range(4, 12)))
    assert train(tmp_path, model, settings) == [1]
    assert "not finite" in (tmp_path / "rank-0.log").read_text()
    assert len([one for one in feedback(tmp_path, "consumed") if one.reason == "non_finite"]) == 6
    found = checkpoint.newest(tmp_path / "checkpoints" / "policy")
    assert (found.state.step, found.state.reader.settled.intervals) == (2, [(0, 4)])


def test_recomputing_activations_changes_nothing_but_memory(run, model, uninterrupted):
    assert train(run, model, {**SETTINGS, "gradient_checkpointing": True}) == [0], logs(run)
    assert_same(parameters(run), parameters(uninterrupted))


def test_bfloat16_trains_with_float32_masters_and_publishes_bfloat16(run, model):
    assert train(run, model, {**SETTINGS, "dtype": "bfloat16", "max_steps": 3}) == [0], logs(run)
    newest = newest_weights(run)
    tensors = verify(Path(newest.location), newest.manifest_sha256).tensors
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
    assert json.loads((Path(newest.location) / "config.json").read_text())["dtype"] == "bfloat16"
