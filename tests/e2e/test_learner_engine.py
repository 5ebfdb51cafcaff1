"""The learner's engine alone, one rank in this process: real DeepSpeed, what a resume takes from the settings."""

import pytest
import torch
from safetensors.torch import load_file

from deploy.tiny_model import save_tiny_model
from learner.config import LearnerConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.distributed.:FutureWarning"),  # what DeepSpeed calls
]

RATE = 1e-3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def refuse(*arguments, **settings):
    pytest.fail("the whole model was moved at once")


@pytest.fixture
def start(directory, deepspeed_ranks):
    """Start an engine with these settings; all are closed after the test."""
    from learner.engine import Engine
    from learner.policy import load_model

    started = []

    def started_with(**settings):
        config = LearnerConfig.model_validate({"num_threads": 1, **settings})
        model = load_model(str(directory), dtype=config.dtype, gradient_checkpointing=False, trust_remote_code=False)
        if config.zero_stage == 3:
            model.to = refuse  # on an instance it hides the method
        started.append(Engine(model, config, deepspeed_ranks))
        return started[-1]

    yield started_with
    for engine in started:
        engine.close()


def take_step(engine, *tokens):
    ids = torch.tensor([tokens])
    engine.accumulate(engine.model(input_ids=ids, labels=ids).loss, is_last=True)
    return engine.step(learning_rate=RATE, weight_decay=0.0, is_vetoed=False)


def weights(engine):
    return {name: tensor.detach().float().clone() for name, tensor in engine.full_weights()}


def typical_move(engine, *tokens):
    """How far one step moves the parameters: the median of those that moved, in learning rates."""
    before = weights(engine)
    assert take_step(engine, *tokens).applied
    after = weights(engine)
    moves = torch.cat([(after[name] - before[name]).abs().flatten() for name in after])
    return float(moves[moves > 0].median()) / RATE


SIGNS = {"betas": [0.0, 0.0], "gradient_clipping": 1.0}
"""AdamW without a memory: every parameter moves by one learning rate, along its gradient's sign."""

STILL = {**SIGNS, "gradient_clipping": 1e-12}
"""Gradients smaller than AdamW's epsilon: nothing moves."""


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize(
    ("saved", "resumed", "moves"), [({**SIGNS, "betas": [0.9, 0.9]}, SIGNS, 1.0), (SIGNS, STILL, 0.0)]
)
def test_a_resume_takes_the_optimizer_that_the_settings_name(start, tmp_path, zero_stage, saved, resumed, moves):
    """What was saved used to come back with the tensors: the old betas, and under ZeRO the old clipping."""
    first = start(zero_stage=zero_stage, optimizer=saved)
    take_step(first, 5, 6, 7, 8)
    first.save(tmp_path)
    second = start(zero_stage=zero_stage, optimizer=resumed)
    second.load(tmp_path)
    assert typical_move(second, 9, 10, 11, 12) == pytest.approx(moves, abs=0.01)


def whole(engine):
    """Parameters that are not shared out at this moment."""
    return [name for name, parameter in engine.model.module.named_parameters() if parameter.numel()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_zero_3_no_rank_ever_needs_memory_for_the_whole_model(start, directory, dtype):
    """The whole model used to be moved to the device at the start, and gathered there for every version."""
    engine = start(zero_stage=3, dtype=dtype)
    assert whole(engine) == []
    published = {}
    for name, tensor in engine.full_weights():
        assert whole(engine) == [name]
        published[name] = tensor.detach().clone()
    assert whole(engine) == []
    for name, tensor in load_file(directory / "model.safetensors").items():
        torch.testing.assert_close(published[name], tensor.to(published[name].dtype), rtol=0, atol=0)
