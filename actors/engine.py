"""The engine that samples: what the generator needs of one, and vLLM behind it.

Knows tokens, weights and versions; knows no log and no topics. vLLM is imported here and in weight_loader only.
`tests/contract/test_engine.py` holds every engine to what is promised here.

    started (holds a version) -> sampling -> paused -> loaded -> sampling -> ... -> closed
                                               `-> a load that failed: paused until it is closed
"""

import asyncio
import itertools
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from actors.config import EngineConfig
from actors.tokens import eos_tokens, load_tokenizer, response_text, tokenize
from streaming.errors import DataError, EngineError, NotReadyError, WeightsError
from streaming.kept import parse_version
from streaming.records import Candidate, PromptRequest, Sampling, Span, Version

CPU_KV_CACHE_BYTES = 256 * 1024 * 1024
"""Enough for 128 short sequences of a small model; vLLM's own default is a share of the host's whole memory."""


OWNED = "STREAMDPO_OWNED_ENGINE"
"""Environment variable of the processes of our engines; another use of vLLM in this installation lacks it."""


class Engine(Protocol):
    """A model that answers prompts while its weights change."""

    @property
    def version(self) -> Version:
        """The weights that a request submitted now is sampled with."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response, in tokens. A prompt must be shorter."""

    def tokenize(self, request: PromptRequest) -> list[int]:
        """The tokens that the model sees: the chat template's for messages, the tokenizer's for plain text.

        Raises DataError where the request has messages and the model no chat template.
        """

    async def generate(
        self, prompt_tokens: list[int], *, num_candidates: int, sampling: Sampling, request_id: str
    ) -> list[Candidate]:
        """Exactly `num_candidates` responses, with the model's own log-prob of every token and who sampled it.

        Goes on across an update; what has no token yet when an update comes is sampled by the new version alone.
        Raises DataError where the request cannot be sampled, EngineError where the engine died or was closed.
        """

    async def logprobs(self, prompt_tokens: list[int], response_tokens: list[int]) -> list[float]:
        """The present version's log-prob of every response token after this prompt (natural log, no temperature)."""

    async def pause(self) -> None:
        """Stop sampling between two tokens. Requests stay; new ones wait."""

    async def load(self, directory: Path, version: Version) -> None:
        """Take the weights in this directory, under this name. Only while paused.

        Raises WeightsError where any of it did not load: the engine must then be closed, never resumed.
        """

    async def resume(self) -> None:
        """Sample on, with what was loaded."""

    async def close(self) -> None:
        """Give everything back and end every process of the engine. Requests in flight raise EngineError.

        A second close does nothing.
        """


async def start_engine(
    config: EngineConfig, directory: Path, version: Version, *, policy: str, trust_remote_code: bool = False
) -> Engine:
    """The engine that the settings name, holding the model in this directory as `version`.

    Raises NotReadyError where it does not start.
    """
    if config.kind == "transformers":
        from actors.transformers_engine import TransformersEngine

        return await TransformersEngine.start(config, directory, version, trust_remote_code=trust_remote_code)
    return await VLLMEngine.start(config, directory, version, policy=policy, trust_remote_code=trust_remote_code)


class VLLMEngine:
    """vLLM's AsyncLLM: engine and worker processes of its own, weights changed in flight."""

    def __init__(self, llm: Any, tokenizer: Any, version: Version, *, policy: str, eos: frozenset[int]) -> None:
        self._llm = llm
        self._max_model_len = int(llm.model_config.max_model_len)
        self._tokenizer = tokenizer
        self._version = version
        self._policy = policy
        self._eos = eos
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._closed = False
        self._requests: set[asyncio.Task[Any]] = set()
        self._num_probes = 0

    @classmethod
    async def start(
        cls, config: EngineConfig, directory: Path, version: Version, *, policy: str, trust_remote_code: bool = False
    ) -> "VLLMEngine":
        """Start vLLM's processes (about 15 s) with the model in this directory. Raises NotReadyError."""
        # In a call of its own: frames of the import are never freed, and would keep what the call returns alive.
        await asyncio.to_thread(_import_vllm, config)
        starting = asyncio.ensure_future(asyncio.to_thread(_start_llm, config, directory, trust_remote_code))
        try:
            llm = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be cancelled, and what it starts would outlive us.
            await asyncio.to_thread((await starting).shutdown)
            raise
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        await llm.update_weight_version(str(version))
        return cls(llm, tokenizer, version, policy=policy, eos=eos_tokens(directory, tokenizer))

    @property
    def version(self) -> Version:
        return self._version

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def tokenize(self, request: PromptRequest) -> list[int]:
        return tokenize(self._tokenizer, request)

    async def generate(
        self, prompt_tokens: list[int], *, num_candidates: int, sampling: Sampling, request_id: str
    ) -> list[Candidate]:
        if sampling.temperature == 0:  # vLLM refuses several greedy samples of one request; all would be the same
            return await self._sample(prompt_tokens, 1, sampling, request_id) * num_candidates
        if sampling.seed is None:
            return await self._sample(prompt_tokens, num_candidates, sampling, request_id)
        each = [msgspec.structs.replace(sampling, seed=sampling.seed + i) for i in range(num_candidates)]
        found = await asyncio.gather(
            *(self._sample(prompt_tokens, 1, own, f"{request_id}-{i}") for i, own in enumerate(each))
        )
        return [candidate for (candidate,) in found]

    async def logprobs(self, prompt_tokens: list[int], response_tokens: list[int]) -> list[float]:
        from vllm import SamplingParams

        tokens = [*prompt_tokens, *response_tokens]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        while True:
            self._num_probes += 1
            version, output = await self._submit(tokens, params, f"probe-{self._num_probes}")
            if _sampled_by(output.outputs[0], version):
                scored = output.prompt_logprobs[len(prompt_tokens) :]
                return [found[token].logprob for token, found in zip(response_tokens, scored, strict=True)]

    async def pause(self) -> None:
        self._admitting.clear()
        with _engine_errors("pause"):
            # AsyncLLM's own method sleeps 20 ms so that outputs come before its return: a fifth of what a stall may
            # last, and nothing here depends on that order. Cached keys stay: salted, no other version reads them.
            await self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)

    async def load(self, directory: Path, version: Version) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        update = WeightTransferUpdateRequest({"directory": str(directory)})
        # All at once: the engine does them in this order, and without waiting for us in between. The label may come
        # early, because nothing is sampled before resume.
        steps = await asyncio.gather(
            self._llm.start_weight_update(),
            self._llm.update_weights(update),
            self._llm.finish_weight_update(),
            self._llm.update_weight_version(str(version)),
            return_exceptions=True,
        )
        for cause in steps:
            if isinstance(cause, BaseException):  # whatever a worker raised, vLLM hands on as a bare Exception
                raise WeightsError(
                    f"version {version} did not load: {cause}", where=str(directory), do="Restart the engine."
                ) from cause
        self._version = version

    async def resume(self) -> None:
        # What has no token yet was submitted under the older version's salt: it is submitted again.
        states = self._llm.output_processor.request_states.values()
        unsampled = [state.request_id for state in states if state.detokenizer.num_output_tokens() == 0]
        with _engine_errors("resume"):
            await self._llm.abort(unsampled, internal=True)
            await self._llm.resume_generation()
        self._admitting.set()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)
        llm, self._llm = self._llm, None  # AsyncLLM's finaliser complains where it outlives the interpreter's modules
        if llm.output_handler is not None:  # it starts with the first request
            llm.output_handler.cancel()  # or it reports the engine's end as a failure
        await asyncio.to_thread(llm.shutdown)

    async def _sample(
        self, prompt_tokens: list[int], count: int, sampling: Sampling, request_id: str
    ) -> list[Candidate]:
        """`count` candidates, each begun by the version that it was submitted to."""
        candidates: list[Candidate] = []
        for attempt in itertools.count():
            missing = count - len(candidates)
            if not missing:
                break
            params = _sampling_params(sampling, missing)
            version, output = await self._submit(prompt_tokens, params, f"{request_id}-{attempt}")
            if len(output.outputs) != missing:
                what = f"vLLM gave {len(output.outputs)} candidates where {missing} were asked for"
                raise EngineError(what, where=request_id, do="Restart the engine.")
            candidates += [self._candidate(found, sampling) for found in output.outputs if _sampled_by(found, version)]
        return candidates

    async def _submit(self, prompt_tokens: list[int], params: Any, request_id: str) -> tuple[Version, Any]:
        """vLLM's final output, and the version under whose salt it was submitted."""
        if self._closed:
            raise _closed_error(request_id)
        request = asyncio.ensure_future(self._final_output(prompt_tokens, params, request_id))
        self._requests.add(request)
        request.add_done_callback(self._requests.discard)
        try:
            return await request
        except asyncio.CancelledError:
            if self._closed:
                raise _closed_error(request_id) from None
            raise

    async def _final_output(self, prompt_tokens: list[int], params: Any, request_id: str) -> tuple[Version, Any]:
        from vllm.inputs.engine import tokens_input

        await self._admitting.wait()
        version = self._version
        prompt = tokens_input(prompt_tokens, cache_salt=f"{self._policy}/{version}")
        output: Any = None
        with _engine_errors(request_id):
            async for newest in self._llm.generate(prompt, params, request_id):
                output = newest
        return version, output

    def _candidate(self, completion: Any, sampling: Sampling) -> Candidate:
        tokens = list(completion.token_ids)
        return Candidate(
            tokens=tokens,
            logprobs=[found[token].logprob for token, found in zip(tokens, completion.logprobs, strict=True)],
            text=response_text(self._tokenizer, tokens, sampling.stop),
            finish_reason=completion.finish_reason,
            has_eos=tokens[-1] in self._eos,
            spans=[
                Span(version=_version_of(span), start=span.start, end=span.end) for span in completion.weight_versions
            ],
        )


def _import_vllm(config: EngineConfig) -> None:
    with _environment(config):
        import vllm.v1.engine.async_llm  # noqa: F401


def _start_llm(config: EngineConfig, directory: Path, trust_remote_code: bool) -> Any:
    """vLLM with its processes running. Blocks for about 15 s."""
    with _environment(config):
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.weight_loader import BACKEND

        on_cpu = current_platform.is_cpu()
        if on_cpu and config.enforce_eager:
            # Without it the first request waits 20 s for two small functions of the sampler to compile.
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
        args = AsyncEngineArgs(
            model=str(directory),
            trust_remote_code=trust_remote_code,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            kv_cache_memory_bytes=config.kv_cache_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None),
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager,
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            seed=secrets.randbits(31),  # vLLM's default is 0: every generator would draw the same numbers
            weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        try:
            return AsyncLLM.from_engine_args(args)
        except Exception as cause:  # anything from a wrong configuration to a missing GPU
            raise NotReadyError(
                f"vLLM does not start: {cause}", where=str(directory), do="See vLLM's own lines above."
            ) from cause


@contextmanager
def _environment(config: EngineConfig) -> Iterator[None]:
    """vLLM and its processes read these when they start; afterwards the environment is as before."""
    before = dict(os.environ)
    os.environ |= {
        OWNED: "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore",  # those of its own libraries
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding fails, or binds to the wrong cores, in a container
    }
    if config.num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(config.num_threads)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before


@contextmanager
def _engine_errors(where: str) -> Iterator[None]:
    """vLLM's exceptions as ours."""
    from vllm.exceptions import VLLMClientError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    try:
        yield
    except (EngineDeadError, EngineGenerateError) as cause:
        raise EngineError(f"vLLM died: {cause}", where=where, do="Restart the engine.") from cause
    except (VLLMClientError, ValueError) as cause:
        raise DataError(
            f"vLLM refuses the request: {cause}", where=where, do="Mend generation.sampling or the prompt."
        ) from cause


def _closed_error(where: str) -> EngineError:
    return EngineError("the engine was closed", where=where, do="Submit the request to another engine.")


def _sampling_params(sampling: Sampling, count: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=count,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        seed=sampling.seed,
        logprobs=0,  # the sampled token's only
        detokenize=bool(sampling.stop),  # the text is decoded once, at the end
        # The default, cumulative, leaves out the candidates that finished before the last one (0.32).
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sampled_by(completion: Any, version: Version) -> bool:
    """Whether it has tokens, the first of them by this version. Else it met an update before it began."""
    spans = completion.weight_versions
    return bool(completion.token_ids) and bool(spans) and _version_of(spans[0]) == version


def _version_of(span: Any) -> Version:
    version = parse_version(span.version)
    assert version is not None, "the label is ours"
    return version
