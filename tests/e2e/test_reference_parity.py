"""The scorer, the learner and whoever loads a published version mean the same by one model. One engine for all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.tiny_model import save_tiny_model
from learner.batch import Example, plan, to_tensors
from learner.config import LearnerConfig
from learner.ranks import Ranks
from streaming import topics
from streaming.log.protocol import Log
from streaming.records import Candidate, Group, Version, WeightVersion, decode
from streaming.reference import ReferenceModel
from tests.builders import EOS, make_candidate, make_group, make_prompt, tokens_of

pytestmark = pytest.mark.slow

CONFIG = LearnerConfig.model_validate({"num_threads": 1, "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0}})
TOLERANCE = 1e-4
LONG_PROMPT = make_prompt(1, text="a prompt that is much longer than the others = ")
ONE_TOKEN = [make_candidate("7", has_eos=False), make_candidate("", tokens=[EOS])]
CUT_OFF = [make_candidate("cut off in the middle of a w", has_eos=False), make_candidate("12", has_eos=False)]
GROUPS = [
    make_group(["12", "a longer answer, with words in it", "12", "(1+2)*3 = 9"]),
    make_group(candidates=ONE_TOKEN),
    make_group(candidates=[*ONE_TOKEN, *CUT_OFF], request=LONG_PROMPT, prompt_tokens=tokens_of(LONG_PROMPT.text or "")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, but far enough from uniform that small changes of its weights change its answers."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model"), tied=True)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in loaded.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    loaded.save_pretrained(directory)
    return directory


class Learner(NamedTuple):
    """A learner's only rank; it holds the initial model until a test trains it."""

    model: Any  # DeepSpeed's
    trainer: Any


@pytest.fixture(scope="module")
def learner(model: Path, deepspeed_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learner]:
    from learner.engine import Engine
    from learner.policy import load_model
    from learner.trainer import Trainer

    loaded = load_model(str(model), dtype="float32", gradient_checkpointing=False, trust_remote_code=False)
    engine = Engine(loaded, CONFIG, deepspeed_ranks)
    yield Learner(engine.model, Trainer(engine, deepspeed_ranks, CONFIG, tmp_path_factory.mktemp("checkpoints")))
    engine.close()


@pytest.fixture(scope="module")
def examples(model: Path) -> list[Example]:
    """Every candidate against the next one of its group, with the scorer's reference log-probs."""
    prices = ReferenceModel(model, batch_tokens=128).price(GROUPS)
    return [
        example(group, group.candidates[i - 1], group.candidates[i], price[i - 1], price[i])
        for group, price in zip(GROUPS, prices, strict=True)
        for i in range(len(price))
    ]


def example(group: Group, chosen: Candidate, rejected: Candidate, *prices: float) -> Example:
    return Example(
        prompt_tokens=group.prompt_tokens,
        chosen_tokens=chosen.tokens,
        rejected_tokens=rejected.tokens,
        reference_chosen=prices[0],
        reference_rejected=prices[1],
    )


@pytest.mark.parametrize("max_tokens", [64, 8192])
def test_the_learner_at_its_first_step_gives_the_log_probs_that_the_scorers_reference_gave(
    learner: Learner, examples: list[Example], max_tokens: int
) -> None:
    """However the learner lays the sequences into batches, the first step's margins are 0."""
    from learner.policy import price

    [shares] = plan(examples, world_size=1, max_tokens=max_tokens)
    for share in shares:
        with torch.no_grad():
            chosen, rejected = price(learner.model, to_tensors([examples[i] for i in share]))
        for side in (chosen, rejected):
            assert side.policy_B.max() < -1, "these are log-probs, not padding"
            torch.testing.assert_close(side.policy_B, side.reference_B, rtol=0, atol=TOLERANCE)


def test_the_first_step_sees_no_margin_and_no_distance_to_the_reference(
    learner: Learner, examples: list[Example]
) -> None:
    numbers = learner.trainer.train(0, examples, gap_scale=1.0)
    assert numbers.loss == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=TOLERANCE)
    assert numbers.kl_to_reference == pytest.approx(0, abs=TOLERANCE)


def test_a_published_version_generates_what_the_learners_model_generates(
    learner: Learner, model: Path, examples: list[Example], tmp_path: Path, log: Log
) -> None:
    from learner.claim import Claim
    from learner.publisher import Publisher

    for step in range(1, 4):
        learner.trainer.train(step, examples, gap_scale=1.0)
    claim = Claim(tmp_path / "checkpoints", log, "policy")
    publisher = Publisher(
        tmp_path / "weights", log, claim, policy="policy", source=model, keep=2, dtype=None, announced=lambda _: None
    )
    learner.trainer.publish(publisher, Version(1, 4), step=4, lineage=[], tokens=None)
    publisher.close()
    [entry] = log.newest(topics.WEIGHTS.name).values()
    published = decode(WeightVersion, entry.value).location
    ours = greedy(learner.model.module, published)
    assert greedy(AutoModelForCausalLM.from_pretrained(published), published) == ours
    assert greedy(AutoModelForCausalLM.from_pretrained(model), model) != ours, "it has learned something"


def greedy(model: Any, directory: str | Path) -> list[str]:
    """The likeliest answers, by the tokenizer of this directory."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = tokenizer([f"{number} + {number} = " for number in range(10)], return_tensors="pt")
    with torch.no_grad():
        answers = model.generate(**prompts, do_sample=False, max_new_tokens=32)
    return tokenizer.batch_decode(answers)
