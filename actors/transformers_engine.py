"""The second engine: transformers' `generate`, in this process. For machines without vLLM, and for quick tests.

Waiting requests with the same settings are answered in one padded batch; an update waits for the batch under way,
so a response never spans two versions. Shapes: B responses, T tokens, V tokens of the vocabulary.
"""

import asyncio
import secrets
from bisect import bisect_left
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, StoppingCriteria

from actors.config import EngineConfig
from actors.tokens import eos_tokens, load_tokenizer, response_text, tokenize
from streaming.errors import DataError, EngineError, NotReadyError, WeightsError
from streaming.logprobs import sequence_logprobs
from streaming.records import Candidate, PromptRequest, Sampling, Span, Version

R = TypeVar("R")


class _Request(NamedTuple):
    prompt_tokens: list[int]
    num_candidates: int
    sampling: Sampling
    max_tokens: int  # that still fit after the prompt
    answer: asyncio.Future[list[Candidate]]


class TransformersEngine:
    """A model in this process, sampled from by one thread, a batch at a time."""

    def __init__(
        self, model: Any, tokenizer: Any, version: Version, *, eos: frozenset[int], config: EngineConfig
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._version = version
        self._eos = eos
        longest = model.config.get_text_config().max_position_embeddings
        self._max_model_len = int(min(config.max_model_len or longest, longest))
        self._max_num_seqs = config.max_num_seqs
        self._waiting: list[_Request] = []
        self._arrived = asyncio.Event()
        self._model_free = asyncio.Lock()
        self._paused = False
        self._closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._runner = asyncio.ensure_future(self._run())

    @classmethod
    async def start(
        cls, config: EngineConfig, directory: Path, version: Version, *, trust_remote_code: bool = False
    ) -> "TransformersEngine":
        """Load the model in this directory. Raises NotReadyError where it does not load."""
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        try:
            model = await asyncio.to_thread(_load_model, config, directory, trust_remote_code)
            tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, SafetensorError) as cause:
            what = f"the model does not load: {cause}"
            raise NotReadyError(
                what, where=str(directory), do="Give a model directory in Hugging Face format."
            ) from cause
        return cls(model, tokenizer, version, eos=eos_tokens(directory, tokenizer), config=config)

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
        if self._closed:
            raise _closed_error()
        if not 0 < len(prompt_tokens) < self._max_model_len:
            what = f"the prompt has {len(prompt_tokens)} tokens"
            raise DataError(what, where=request_id, do=f"Prompts have 1 to {self._max_model_len - 1} tokens.")
        answer: asyncio.Future[list[Candidate]] = asyncio.get_running_loop().create_future()
        max_tokens = min(sampling.max_tokens, self._max_model_len - len(prompt_tokens))
        self._waiting.append(_Request(prompt_tokens, num_candidates, sampling, max_tokens, answer))
        self._arrived.set()
        return await answer

    async def logprobs(self, prompt_tokens: list[int], response_tokens: list[int]) -> list[float]:
        async with self._model_free:
            if self._closed:
                raise _closed_error()
            (found,) = await self._in_thread(
                partial(sequence_logprobs, self._model, [(prompt_tokens, response_tokens)])
            )
            return found

    async def pause(self) -> None:
        await self._model_free.acquire()
        self._paused = True

    async def load(self, directory: Path, version: Version) -> None:
        try:
            await self._in_thread(partial(_load_weights, self._model, directory))
        except (OSError, RuntimeError, SafetensorError) as cause:
            raise WeightsError(
                f"version {version} did not load: {cause}", where=str(directory), do="Restart the engine."
            ) from cause
        self._version = version

    async def resume(self) -> None:
        self._paused = False
        self._model_free.release()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._runner.cancel()
        await asyncio.gather(self._runner, return_exceptions=True)
        _refuse(self._waiting, _closed_error())
        if self._paused:
            await self.resume()
        await asyncio.to_thread(self._thread.shutdown)
        self._model = None  # whoever replaces this engine still holds it, while the next one loads
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            async with self._model_free:
                batch = self._take()
                try:
                    answers = await self._in_thread(partial(self._answer, batch, self._version))
                except asyncio.CancelledError:
                    _refuse(batch, _closed_error())
                    raise
                except Exception as cause:  # out of memory, mostly: whoever asked decides what to do
                    _refuse(batch, EngineError(f"generate failed: {cause}", where="transformers", do="Restart it."))
                    continue
            for request, candidates in zip(batch, answers, strict=True):
                if not request.answer.done():
                    request.answer.set_result(candidates)

    def _take(self) -> list[_Request]:
        """The oldest request and those that can be sampled with it, off the list of waiting ones.

        Requests with a seed are sampled alone, or their answers would depend on their company.
        """
        waiting = [request for request in self._waiting if not request.answer.done()]
        batch: list[_Request] = []
        room = self._max_num_seqs
        for request in waiting:
            alike = not batch or request[2:4] == batch[0][2:4]
            if not batch or (alike and request.sampling.seed is None and request.num_candidates <= room):
                batch.append(request)
                room -= request.num_candidates
        taken = {id(request) for request in batch}
        self._waiting = [request for request in waiting if id(request) not in taken]
        if not self._waiting:
            self._arrived.clear()
        return batch

    async def _in_thread(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _answer(self, batch: list[_Request], version: Version) -> list[list[Candidate]]:
        if not batch:
            return []
        sampling = batch[0].sampling
        prompts = [request.prompt_tokens for request in batch for _ in range(request.num_candidates)]
        rows, logprobs = self._sample(prompts, sampling, batch[0].max_tokens)
        candidates = iter(
            [self._candidate(tokens, found, sampling, version) for tokens, found in zip(rows, logprobs, strict=True)]
        )
        return [[next(candidates) for _ in range(request.num_candidates)] for request in batch]

    def _sample(
        self, prompts: list[list[int]], sampling: Sampling, max_tokens: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Response tokens (with padding behind the end) and their log-probs, a row per prompt."""
        width = max(map(len, prompts))
        pad = min(self._eos, default=0)
        ids_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=self._model.device)
        mask_BT = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self._model.device
        )
        recorder = _Recorder(width)
        with torch.inference_mode(), torch.random.fork_rng():
            # torch's own first seed is the same in every process, and so would be the samples.
            torch.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
            out_BT = self._model.generate(
                ids_BT,
                attention_mask=mask_BT,
                generation_config=self._settings(sampling, max_tokens, pad),
                logits_processor=[recorder],
                stopping_criteria=[_Interrupt(lambda: self._closed)],
                tokenizer=self._tokenizer if sampling.stop else None,
            )
        return out_BT[:, width:].tolist(), recorder.finish(out_BT).tolist()

    def _settings(self, sampling: Sampling, max_tokens: int, pad: int) -> GenerationConfig:
        greedy = sampling.temperature == 0
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        return GenerationConfig(
            do_sample=not greedy,
            **({} if greedy else drawn),
            max_new_tokens=max_tokens,
            eos_token_id=sorted(self._eos | set(sampling.stop_token_ids)) or None,
            pad_token_id=pad,
            stop_strings=list(sampling.stop) or None,
        )

    def _candidate(self, row: list[int], logprobs: list[float], sampling: Sampling, version: Version) -> Candidate:
        length, stopped = self._end_of(row, sampling)
        tokens = row[:length]
        return Candidate(
            tokens=tokens,
            logprobs=logprobs[:length],
            text=response_text(self._tokenizer, tokens, sampling.stop),
            finish_reason="stop" if stopped else "length",
            has_eos=tokens[-1] in self._eos,
            spans=[Span(version=version, start=0, end=length)],
        )

    def _end_of(self, row: list[int], sampling: Sampling) -> tuple[int, bool]:
        """How many of the row's tokens are the response, and whether it stopped by itself."""
        enders = self._eos | set(sampling.stop_token_ids)
        ended = next((length for length, token in enumerate(row, start=1) if token in enders), None)
        longest = ended or len(row)

        def is_stopped(length: int) -> bool:
            text = self._tokenizer.decode(row[:length], skip_special_tokens=True)
            return any(stop in text for stop in sampling.stop)

        if sampling.stop and is_stopped(longest):  # mostly it is not: then one look is enough
            return bisect_left(range(longest), True, lo=1, key=is_stopped), True
        return longest, ended is not None


class _Recorder(LogitsProcessor):  # type: ignore[misc]
    """Changes nothing: keeps the model's own log-prob of each sampled token, without keeping every step's logits."""

    def __init__(self, prompt_width: int) -> None:
        self._prompt_width = prompt_width
        self._newest_BV: Tensor | None = None
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._pick(input_ids)
        self._newest_BV = scores.float().log_softmax(-1)
        return scores

    def finish(self, out_BT: Tensor) -> Tensor:
        """Log-probs of all response tokens, once the last one is known."""
        self._pick(out_BT)
        assert len(self._chosen) == out_BT.shape[1] - self._prompt_width
        return torch.cat(self._chosen, dim=1)

    def _pick(self, ids_BT: Tensor) -> None:
        if self._newest_BV is not None:
            self._chosen.append(self._newest_BV.gather(-1, ids_BT[:, -1:]))


class _Interrupt(StoppingCriteria):  # type: ignore[misc]
    """Ends a batch whose answers nobody waits for any more: a batch of long responses takes minutes on a CPU."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        return torch.full((len(input_ids),), self._is_over(), device=input_ids.device)


def _load_model(config: EngineConfig, directory: Path, trust_remote_code: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, config.dtype), trust_remote_code=trust_remote_code
    )
    model.generation_config = GenerationConfig()  # its settings would be mixed into the request's
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _load_weights(model: Any, directory: Path) -> None:
    state: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= load_file(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if wrong := [*(set(missing) - tied), *unexpected]:
        raise RuntimeError(f"parameters missing or unknown: {', '.join(sorted(wrong)[:5])}")


def _refuse(requests: list[_Request], error: Exception) -> None:
    for request in requests:
        if not request.answer.done():
            request.answer.set_exception(error)


def _closed_error() -> EngineError:
    return EngineError("the engine was closed", where="transformers", do="Submit the request to another engine.")
