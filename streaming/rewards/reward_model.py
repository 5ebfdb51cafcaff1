"""A Hugging Face sequence classifier with one output as a reward source.

It reads what TRL 1.16 gives it: a plain prompt followed by the completion's text, or the conversation with the
completion as the assistant's turn, written by the reward model's own chat template; no special tokens are added.
What is longer than the model takes has no reward: a truncated answer would get the reward of another one.
"""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from streaming.errors import NotReadyError
from streaming.records import Group
from streaming.reference import weights_version
from streaming.rewards.protocol import Reward, checked, missing
from streaming.rewards.workers import Coalescer
from streaming.token_batches import padded_batches

_LOGGER = logging.getLogger(__name__)

_MAX_GROUPS = 64
"""Groups in one go: enough to fill batches of like length, few enough that none waits long for the others."""

_UNLIMITED = 10**9
"""transformers says "no limit" with a model_max_length of about 1e30."""


class RewardModel:
    """A reward source around a classifier. Groups that come while it works are judged together."""

    def __init__(
        self,
        model: str,
        *,
        name: str,
        batch_tokens: int,
        timeout_s: float = 60.0,
        num_threads: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Raises NotReadyError where `model` (a directory or a hub name) is no classifier with one trained output."""
        self.name = name
        self._tokenizer, self._model = _load(model, trust_remote_code=trust_remote_code)
        self.version = weights_version(Path(model)) if Path(model).is_dir() else model
        self._max_tokens = _max_tokens(self._tokenizer, self._model.config)
        self._batch_tokens = batch_tokens
        self._timeout_s = timeout_s
        self._num_threads = num_threads
        self._has_logged = False
        self._coalescer = Coalescer(self._judge, name=f"reward-{name}", max_items=_MAX_GROUPS)

    async def score(self, group: Group) -> list[Reward]:
        """One reward per candidate; see RewardSource."""
        future = asyncio.wrap_future(self._coalescer.submit(group))
        done, _ = await asyncio.wait({future}, timeout=self._timeout_s)
        if not done:
            future.cancel()
            return missing("timeout", len(group.candidates))
        error = future.exception()
        if error is None:
            return future.result()
        if not self._has_logged:
            self._has_logged = True
            _LOGGER.error("reward model %s raised; later errors are counted, not shown", self.name, exc_info=error)
        return missing("error", len(group.candidates))

    def close(self) -> None:
        """End the thread; what waits for it is cancelled."""
        self._coalescer.close()

    def _judge(self, groups: list[Group]) -> list[list[Reward]]:
        if self._num_threads:
            torch.set_num_threads(self._num_threads)  # of this thread: OpenMP keeps the number per thread
        rewards: list[list[Reward]] = []
        sequences: list[list[int]] = []
        for group in groups:
            texts = self._texts(group)
            if texts is None:
                rewards.append(missing("no_chat_template", len(group.candidates)))
                continue
            tokens = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            rewards.append([Reward(None, "too_long") if len(ids) > self._max_tokens else Reward(0.0) for ids in tokens])
            sequences += [ids for ids in tokens if len(ids) <= self._max_tokens]
        values = iter(checked(self._values(sequences)))
        return [[reward if reward.reason else next(values) for reward in group] for group in rewards]

    def _texts(self, group: Group) -> list[str] | None:
        request = group.request
        if request.messages is None:
            return [(request.text or "") + candidate.text for candidate in group.candidates]
        if not self._tokenizer.chat_template:
            return None
        messages = [{"role": message.role, "content": message.content} for message in request.messages]
        return [
            self._tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": candidate.text}], tokenize=False
            )
            for candidate in group.candidates
        ]

    def _values(self, sequences: Sequence[list[int]]) -> list[float]:
        values = [0.0] * len(sequences)
        for batch in padded_batches([len(ids) for ids in sequences], self._batch_tokens):
            padded = self._tokenizer.pad(
                {"input_ids": [sequences[index] for index in batch]}, padding_side="right", return_tensors="pt"
            )
            with torch.inference_mode():
                logits = self._model(**padded.to(self._model.device)).logits[:, 0].float()
            for index, value in zip(batch, logits.tolist(), strict=True):
                values[index] = value
        return values


def _load(model: str, *, trust_remote_code: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        classifier, info = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError) as cause:
        raise _not_ready(model, f"did not load with one output: {cause}") from cause
    if info["missing_keys"]:
        raise _not_ready(model, f"has no trained weights for {', '.join(sorted(info['missing_keys']))}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # The classifier reads the last token that is not padding: it has to know which one that is.
    classifier.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return tokenizer, classifier.eval().requires_grad_(False).to(device)


def _max_tokens(tokenizer: Any, config: Any) -> int:
    limits = [tokenizer.model_max_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    return min([int(limit) for limit in limits if limit is not None and limit < _UNLIMITED], default=_UNLIMITED)


def _not_ready(model: str, what: str) -> NotReadyError:
    return NotReadyError(
        what,
        where=f"reward model {model}",
        do="Name a sequence-classification model that was trained as a reward model.",
    )
