"""What stands in for models: an engine that answers at random, a reference with one opinion, and two judges."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from actors.tokens import tokenize
from deploy.tiny_model import build_tokenizer
from streaming.records import Candidate, Group, PromptRequest, Sampling, Span, Version
from tests.builders import make_candidate

SLOWEST_S = 0.06
"""Longest time that a group takes to be sampled."""


class RandomEngine:
    """Answers after a while, at random: a request that is sampled again gets other candidates."""

    max_model_len = 64

    def __init__(self, version: Version, chance: random.Random) -> None:
        self.version = version
        self._chance = chance
        self._tokenizer = build_tokenizer()

    @classmethod
    async def start(cls, directory: Path, version: Version) -> "RandomEngine":
        return cls(version, random.Random())

    def tokenize(self, request: PromptRequest) -> list[int]:
        return tokenize(self._tokenizer, request)

    async def generate(
        self, prompt_tokens: list[int], *, num_candidates: int, sampling: Sampling, request_id: str
    ) -> list[Candidate]:
        first = self.version
        await asyncio.sleep(self._chance.random() * SLOWEST_S)
        return [self._candidate(first) for _ in range(num_candidates)]

    async def logprobs(self, prompt_tokens: list[int], response_tokens: list[int]) -> list[float]:
        return [-1.0] * len(response_tokens)

    async def pause(self) -> None:
        return

    async def load(self, directory: Path, version: Version) -> None:
        self.version = version

    async def resume(self) -> None:
        return

    async def close(self) -> None:
        return

    def _candidate(self, first: Version) -> Candidate:
        candidate = make_candidate(str(self._chance.randrange(1000)), version=self.version)
        if first == self.version:
            return candidate
        num_tokens = len(candidate.tokens)
        spans = [Span(version=first, start=0, end=1), Span(version=self.version, start=1, end=num_tokens)]
        return make_candidate(candidate.text, version=self.version, spans=spans)


class FixedReference:
    """Gives every token the same log-prob."""

    version = "reference"

    def logprobs(self, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        return [-1.0 * len(response) for _, response in examples]

    def price(self, groups: Sequence[Group]) -> list[list[float]]:
        return [[-1.0 * len(candidate.tokens) for candidate in group.candidates] for group in groups]


JUDGES = """
import asyncio, time, zlib


def judge(completions, **columns):
    return [zlib.crc32(completion.encode()) % 1000 / 1000 for completion in completions]


async def liar(prompts, completions, **columns):
    kind = zlib.crc32(repr((prompts, completions)).encode()) % 8
    if kind == 0:
        await asyncio.sleep(3600)  # hangs
    if kind == 1:
        raise RuntimeError("HTTP 500")
    if kind == 2:
        return [0.5]  # the wrong count
    if kind == 3:
        return [float("nan")] * len(completions)
    if kind == 4:
        return ["much", None][: len(completions)]
    return [1.0] * len(completions)  # a constant


def sleeper(completions, **columns):
    if zlib.crc32(repr(completions).encode()) % 5 == 0:
        time.sleep(0.4)  # holds its thread, beyond its deadline
    return [0.0] * len(completions)
"""
"""A source that judges, and two that cannot be trusted."""
