"""Records with sensible defaults: a test names only the fields that it is about.

Tokens are those of the tiny model's tokenizer (`deploy.tiny_model`): one per character, 1 ends a sequence.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from deploy.config import RunConfig
from deploy.tiny_model import CHARACTERS
from streaming.log.protocol import Entry
from streaming.records import (
    Candidate,
    Feedback,
    Group,
    Margins,
    Pair,
    PromptRequest,
    Record,
    Response,
    RoleState,
    ScoredGroup,
    SourceRewards,
    Span,
    Version,
    WeightVersion,
    encode,
)

EOS = 1
FIRST = Version(1, 0)
"""The initial model's version."""


def tokens_of(text: str) -> list[int]:
    """What the tiny model's tokenizer makes of a text of known characters."""
    return [3 + CHARACTERS.index(character) for character in text]


def make_prompt(number: int = 0, **fields: Any) -> PromptRequest:
    """Request number N of a run, for prompt "pN"."""
    return PromptRequest(
        **{"number": number, "prompt_id": f"p{number}", "num_candidates": 2, "text": f"{number}+1=", **fields}
    )


def make_candidate(
    text: str = "2", *, has_eos: bool = True, logprob: float = -0.5, version: Version = FIRST, **fields: Any
) -> Candidate:
    """A response to a prompt; every token has log-prob `logprob` and comes from `version`."""
    tokens = fields.pop("tokens", tokens_of(text) + [EOS] * has_eos)
    defaults: dict[str, Any] = {
        "tokens": tokens,
        "logprobs": [logprob] * len(tokens),
        "text": text,
        "finish_reason": "stop" if has_eos else "length",
        "has_eos": has_eos,
        "spans": [Span(version=version, start=0, end=len(tokens))],
    }
    return Candidate(**{**defaults, **fields})


def make_group(texts: Sequence[str] = ("a", "b"), *, number: int = 0, version: Version = FIRST, **fields: Any) -> Group:
    """The candidates with these texts for request `number`."""
    request = fields.pop("request", make_prompt(number, num_candidates=len(texts)))
    defaults: dict[str, Any] = {
        "request": request,
        "prompt_tokens": tokens_of(request.text or "hi"),
        "candidates": [make_candidate(text, version=version) for text in texts],
        "policy": "policy",
        "generator": "generator-0",
        "sampled_s": 0.0,
    }
    return Group(**{**defaults, **fields})


def make_scored(
    rewards: Sequence[float | None] | Mapping[str, Sequence[float | None]] = (1.0, 0.0),
    *,
    texts: Sequence[str] | None = None,
    number: int = 0,
    group: Group | None = None,
    **fields: Any,
) -> ScoredGroup:
    """A group with one candidate per reward, all texts different unless `texts` says otherwise.

    Several sources are a mapping of name to rewards, each with weight 1. A missing reward has the reason "test".
    """
    sources = rewards if isinstance(rewards, Mapping) else {"reward": rewards}
    num_candidates = len(next(iter(sources.values())))
    group = group or make_group(texts or distinct_texts(num_candidates), number=number)
    defaults: dict[str, Any] = {
        "group": group,
        "rewards": [make_rewards(values, source=name) for name, values in sources.items()],
        "reference_logprobs": [sum(candidate.logprobs) for candidate in group.candidates],
        "reference_version": "reference",
    }
    return ScoredGroup(**{**defaults, **fields})


def make_rewards(values: Sequence[float | None], *, source: str = "reward", weight: float = 1.0) -> SourceRewards:
    """A source's verdict; a missing value has the reason "test"."""
    reasons = [None if value is not None else "test" for value in values]
    return SourceRewards(source=source, weight=weight, values=list(values), reasons=reasons if None in values else [])


def distinct_texts(num: int) -> list[str]:
    """As many different texts as asked for."""
    return [str(i) for i in range(num)]


def make_response(text: str = "2", *, candidate: int = 0, version: Version = FIRST, **fields: Any) -> Response:
    """One side of a pair, with a reference log-prob of -1 per token."""
    tokens = fields.pop("tokens", [*tokens_of(text), EOS])
    defaults: dict[str, Any] = {
        "candidate": candidate,
        "tokens": tokens,
        "reference_logprob": -1.0 * len(tokens),
        "reward": None,
        "sampled_logprob": -0.5 * len(tokens),
        "spans": [Span(version=version, start=0, end=len(tokens))],
        "text": text,
    }
    return Response(**{**defaults, **fields})


def make_pair(
    number: int = 0, *, chosen: str = "2", rejected: str | None = "3", version: Version = FIRST, **fields: Any
) -> Pair:
    """A DPO example of request `number` (an SFT example where `rejected` is None); both sides from `version`."""
    request = make_prompt(number)
    defaults: dict[str, Any] = {
        "policy": "policy",
        "request_number": number,
        "group_id": request.group_id,
        "prompt_id": request.prompt_id,
        "content_hash": f"content-{number}",
        "prompt_tokens": tokens_of(request.text or ""),
        "chosen": make_response(chosen, candidate=0, version=version, reward=1.0),
        "rejected": None if rejected is None else make_response(rejected, candidate=1, version=version, reward=0.0),
        "route": "sft" if rejected is None else "dpo",
        "margins": Margins(external=None if rejected is None else 1.0),
        "settings_hash": "settings",
        "reference_version": "reference",
        "prompt_text": request.text or "",
    }
    return Pair(**{**defaults, **fields})


def make_feedback(number: int = 0, *, ending: str = "trained", **fields: Any) -> Feedback:
    """How the only example of request `number` ended."""
    request = make_prompt(number)
    defaults: dict[str, Any] = {
        "request_number": number,
        "group_id": request.group_id,
        "prompt_id": request.prompt_id,
        "policy": "policy",
        "ending": ending,
        "stage": "test",
    }
    return Feedback(**{**defaults, **fields})


def make_weights(version: Version = FIRST, *, location: str = "weights", **fields: Any) -> WeightVersion:
    """The announcement of a published version."""
    defaults: dict[str, Any] = {
        "policy": "policy",
        "version": version,
        "location": location,
        "manifest_sha256": "0" * 64,
        "step": version.number,
    }
    return WeightVersion(**{**defaults, **fields})


def make_role(role: str = "learner", *, index: int = 0, **fields: Any) -> RoleState:
    """A heartbeat."""
    defaults: dict[str, Any] = {"role": role, "role_id": f"{role}-{index}", "pid": 1, "host": "host", "time_s": 0.0}
    return RoleState(**{**defaults, **fields})


LEAST: dict[str, Any] = {
    "name": "mine",
    "model": "model",
    "prompts": {"path": "prompts.jsonl"},
    "rewards": [{"name": "length", "function": "reward.py:score"}],
}
"""What every run's file has to say."""


def make_config(directory: str | Path = "runs/mine", **changed: Any) -> RunConfig:
    """The settings of a run that lies in `directory`. Nothing that they name is there."""
    return RunConfig.model_validate({**LEAST, "directory": str(directory), **changed})


def broken(record: Record, **fields: Any) -> bytes:
    """A record's bytes with these values in its fields, whether they fit or not."""
    return msgspec.msgpack.encode({**msgspec.msgpack.decode(encode(record)), **fields})


def make_entry(
    value: bytes | Record = b"", *, topic: str = "in", partition: int = 0, offset: int = 0, key: bytes = b"key"
) -> Entry:
    """A record as it lies in the log."""
    value = encode(value) if isinstance(value, Record) else value
    return Entry(topic, partition, offset, key, value, 0.0)
