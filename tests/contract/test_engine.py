"""Every engine keeps these promises: vLLM and transformers run the same tests on the same models."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch

from actors.config import EngineConfig
from actors.engine import Engine, start_engine
from actors.parity import max_difference
from actors.transformers_engine import TransformersEngine
from actors.update import Weights, announced, apply_weights
from deploy.tiny_model import build_tokenizer
from streaming.errors import DataError, EngineError
from streaming.logprobs import sequence_logprobs
from streaming.records import Candidate, Message, Sampling, Version, WeightVersion
from tests.builders import EOS, make_prompt, tokens_of
from tests.published import load_published, publish

pytestmark = pytest.mark.asyncio(loop_scope="module")

KINDS = ["transformers", pytest.param("vllm", marks=pytest.mark.slow)]
TOLERANCE = 1e-4
PROMPT = tokens_of("12+34=")
LONG_PROMPT = PROMPT * 30
"""Longer than a block of vLLM's prefix cache (128 tokens on CPU), so that its keys are found again."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def first(folder: Path) -> WeightVersion:
    return publish(folder, Version(1, 0), seed=100)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def engine(request: pytest.FixtureRequest, first: WeightVersion) -> AsyncIterator[Engine]:
    """Holds `first` until the tests of updates at the end of this file."""
    engine = await start_engine(
        EngineConfig(kind=request.param, num_threads=1, max_num_seqs=16),
        Path(first.location),
        first.version,
        policy="policy",
    )
    yield engine
    await engine.close()


async def sample(engine: Engine, num: int = 4, *, prompt: list[int] = PROMPT, **sampling: object) -> list[Candidate]:
    settings = Sampling(**{"max_tokens": 40, **sampling})  # type: ignore[arg-type]
    return await engine.generate(prompt, num_candidates=num, sampling=settings, request_id="test")


async def test_as_many_candidates_come_back_as_were_asked_for(engine: Engine) -> None:
    groups = await asyncio.gather(*(sample(engine, num) for num in (1, 2, 3, 8) * 8))
    assert [len(group) for group in groups] == [1, 2, 3, 8] * 8
    assert len({tuple(c.tokens) for group in groups for c in group}) > 8 * 12


async def test_a_candidate_is_consistent_with_itself(engine: Engine) -> None:
    for candidate in await sample(engine, 32, max_tokens=200):
        assert len(candidate.logprobs) == len(candidate.tokens) == candidate.spans[-1].end
        assert candidate.version == Version(1, 0)
        assert candidate.has_eos == (candidate.tokens[-1] == EOS) == (candidate.finish_reason == "stop")
        assert EOS not in candidate.tokens[:-1]
        assert candidate.text == build_tokenizer().decode(candidate.tokens, skip_special_tokens=True)
        assert "<eos>" not in candidate.text


async def test_some_candidates_end_by_themselves_and_some_are_cut_off(engine: Engine) -> None:
    candidates = await sample(engine, 32, max_tokens=60)
    assert {candidate.finish_reason for candidate in candidates} == {"stop", "length"}
    assert {len(c.tokens) for c in candidates if not c.has_eos} == {60}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5, "top_p": 0.8, "top_k": 20}, {"temperature": 2.0}])
async def test_logprobs_are_the_models_own_before_temperature(
    engine: Engine, first: WeightVersion, sampling: dict[str, float]
) -> None:
    candidates = await sample(engine, 8, **sampling)
    expected = sequence_logprobs(load_published(first), [(PROMPT, candidate.tokens) for candidate in candidates])
    assert largest_difference([candidate.logprobs for candidate in candidates], expected) < TOLERANCE


async def test_given_tokens_are_scored_as_the_learner_scores_them(engine: Engine, first: WeightVersion) -> None:
    assert first.probe
    assert await max_difference(engine, first.probe) < TOLERANCE


async def test_a_seed_decides_the_candidates_and_tells_them_apart(engine: Engine) -> None:
    one, two, other = await asyncio.gather(*(sample(engine, 4, seed=seed) for seed in (7, 7, 1007)))
    assert [c.tokens for c in one] == [c.tokens for c in two] != [c.tokens for c in other]
    assert len({tuple(c.tokens) for c in one}) == 4


async def test_without_a_seed_two_samples_differ(engine: Engine) -> None:
    one, two = await asyncio.gather(sample(engine), sample(engine))
    assert not {tuple(c.tokens) for c in one} & {tuple(c.tokens) for c in two}


async def test_temperature_zero_gives_the_likeliest_response_every_time(engine: Engine, first: WeightVersion) -> None:
    candidates = await sample(engine, 3, temperature=0.0)
    assert len(candidates) == 3
    assert len({tuple(c.tokens) for c in candidates}) == 1
    likeliest = load_published(first)(torch.tensor([[*PROMPT, *candidates[0].tokens]])).logits[0].argmax(-1).tolist()
    assert candidates[0].tokens == likeliest[len(PROMPT) - 1 : -1]


async def test_a_stop_text_ends_a_response_and_is_not_in_its_text(engine: Engine) -> None:
    candidates = await sample(engine, 16, stop=["e", "7"], max_tokens=200)
    stopped = [c for c in candidates if not c.has_eos and c.finish_reason == "stop"]
    assert stopped
    for candidate in candidates:
        assert not {"e", "7"} & set(candidate.text)
        assert candidate.version is not None
    for candidate in stopped:
        assert candidate.tokens[-1] in tokens_of("e7")


async def test_a_stop_token_ends_a_response(engine: Engine) -> None:
    (token,) = tokens_of("e")
    candidates = await sample(engine, 16, stop_token_ids=[token], max_tokens=200)
    assert any(c.tokens[-1] == token and c.finish_reason == "stop" for c in candidates)
    assert not any(token in c.tokens[:-1] for c in candidates)


async def test_a_response_ends_where_the_model_ends(engine: Engine) -> None:
    prompt = PROMPT * 84  # 504 of 512 tokens
    candidates = await engine.generate(prompt, num_candidates=8, sampling=Sampling(), request_id="long")
    assert engine.max_model_len == 512
    assert max(len(candidate.tokens) for candidate in candidates) == 8


@pytest.mark.parametrize("prompt", [[], PROMPT * 86])
async def test_a_prompt_that_cannot_be_sampled_is_refused_alone(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(DataError):
        await engine.generate(prompt, num_candidates=1, sampling=Sampling(), request_id="bad")
    assert len(await sample(engine, 1)) == 1


async def test_messages_are_rendered_by_the_models_chat_template(engine: Engine) -> None:
    request = make_prompt(
        text=None, messages=[Message(role="system", content="add"), Message(role="user", content="1+1")]
    )
    assert engine.tokenize(request) == tokens_of("<system>add\n<user>1+1\n<assistant>")
    assert engine.tokenize(make_prompt(text="1+1=")) == tokens_of("1+1=")


@pytest.mark.parametrize("kind", ["transformers"])
async def test_messages_without_a_chat_template_are_an_error_that_says_so(folder: Path, kind: str) -> None:
    weights = publish(folder, Version(9, 9), chat_template=False)
    engine = await start_engine(
        EngineConfig(kind="transformers", num_threads=1), Path(weights.location), weights.version, policy="p"
    )
    with pytest.raises(DataError, match="no chat template"):
        engine.tokenize(make_prompt(text=None, messages=[Message(role="user", content="1+1")]))
    await engine.close()


async def test_after_each_of_five_updates_logprobs_are_the_new_versions(
    engine: Engine, folder: Path, first: WeightVersion
) -> None:
    """With three times as many other responses under way as fit at once: some have tokens, some have none yet."""
    versions = [Version(1, 1), Version(1, 2), Version(1, 5), Version(2, 3), Version(2, 4)]
    updates = [publish(folder, version, seed=i) for i, version in enumerate(versions)]
    models = {weights.version: load_published(weights) for weights in [first, *updates]}
    others = [asyncio.create_task(sample(engine, prompt=LONG_PROMPT, max_tokens=300)) for _ in range(12)]
    await asyncio.wait(others, timeout=0.1)
    for weights in updates:
        assert await apply_weights(engine, announced(weights))
        assert engine.version == weights.version
        assert weights.probe
        assert await max_difference(engine, weights.probe) < TOLERANCE
        for candidate in await sample(engine, prompt=LONG_PROMPT):
            assert candidate.version == weights.version
            assert begins_as(models[weights.version], candidate)
    candidates = list(itertools.chain(*await asyncio.gather(*others)))
    for candidate in candidates:
        check_spans(candidate)
        assert begins_as(models[candidate.spans[0].version], candidate)
    is_in_flight = not isinstance(engine, TransformersEngine)  # that one waits for the batch under way
    assert any(candidate.version is None for candidate in candidates) == is_in_flight


def check_spans(candidate: Candidate) -> None:
    """Spans cover every token once, in the order of versions, and only one span makes a single version."""
    spans = candidate.spans
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == len(candidate.tokens) == len(candidate.logprobs)
    assert [span.version for span in spans] == sorted({span.version for span in spans})
    assert candidate.version == (spans[0].version if len(spans) == 1 else None)


def begins_as(model: object, candidate: Candidate) -> bool:
    """Whether the tokens of the first span have this model's log-probs (later ones attend to older keys)."""
    end = candidate.spans[0].end
    expected = sequence_logprobs(model, [(LONG_PROMPT, candidate.tokens[:end])])
    return largest_difference([candidate.logprobs[:end]], expected) < TOLERANCE


async def test_a_version_that_is_not_newer_is_not_applied(engine: Engine, folder: Path) -> None:
    assert engine.version == Version(2, 4)
    for older in (Version(2, 4), Version(2, 3), Version(1, 99)):
        assert not await apply_weights(engine, Weights(folder / "not read", older, None, None))
    assert engine.version == Version(2, 4)
    assert len(await sample(engine)) == 4


async def test_requests_submitted_while_paused_are_sampled_by_the_next_version(engine: Engine, folder: Path) -> None:
    weights = publish(folder, Version(3, 0), seed=30)
    await engine.pause()
    waiting = [asyncio.create_task(sample(engine, 2)) for _ in range(8)]
    done, _ = await asyncio.wait(waiting, timeout=0.05)
    assert not done
    await engine.load(Path(weights.location), weights.version)
    await engine.resume()
    assert {c.version for group in await asyncio.gather(*waiting) for c in group} == {Version(3, 0)}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def tied(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[tuple[Engine, set[psutil.Process]]]:
    """An engine with a model whose output head is its embedding, and its processes. The last test closes it."""
    others = engine_processes()
    first = publish(folder / f"tied-{request.param}", Version(1, 0), tied=True)
    config = EngineConfig(kind=request.param, num_threads=1)
    engine = await start_engine(config, Path(first.location), first.version, policy="policy")
    yield engine, engine_processes() - others
    await engine.close()


async def test_tied_embeddings_follow_an_update(tied: tuple[Engine, set[psutil.Process]], tmp_path: Path) -> None:
    for number in (1, 2):
        weights = publish(tmp_path, Version(1, number), seed=number, tied=True)
        await apply_weights(tied[0], announced(weights))
        assert weights.probe
        assert await max_difference(tied[0], weights.probe) < TOLERANCE


async def test_close_ends_requests_and_leaves_no_process(tied: tuple[Engine, set[psutil.Process]]) -> None:
    engine, processes = tied
    under_way = [asyncio.create_task(sample(engine, 4, max_tokens=450)) for _ in range(64)]
    await asyncio.wait(under_way, timeout=0.1)
    await engine.close()
    outcomes = await asyncio.gather(*under_way, return_exceptions=True)
    assert any(isinstance(outcome, EngineError) for outcome in outcomes)
    assert all(isinstance(outcome, EngineError | list) for outcome in outcomes)
    with pytest.raises(EngineError):
        await sample(engine)
    assert not psutil.wait_procs(processes, timeout=5)[1]
    await engine.close()


def engine_processes() -> set[psutil.Process]:
    """Every process that vLLM runs for this one."""
    return {process for process in psutil.Process().children(recursive=True) if process.name().startswith("VLLM::")}


def largest_difference(found: list[list[float]], expected: list[list[float]]) -> float:
    return max(
        abs(a - b) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)
    )
