"""The frozen reference model: what log pi_ref(y|x) is, for the very tokens that a generator sampled.

Knows groups and tokens; knows no log and no rewards. Its version is a hash of its weights, so that pairs priced
by another reference are recognised wherever they turn up.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from streaming.errors import NotReadyError, RecordError
from streaming.logprobs import Example, sequence_logprobs
from streaming.records import Group, stable_id
from streaming.token_batches import padded_batches
from streaming.weights import file_sha256

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "config.json")
"""What decides a model's output: its weights, and the configuration that gives them their meaning."""


class ReferenceModel:
    """A causal language model that never changes. Use it from one thread at a time."""

    def __init__(
        self,
        directory: str | Path,
        *,
        batch_tokens: int,
        dtype: str = "float32",
        num_threads: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Raises NotReadyError where no model can be loaded from `directory`."""
        self._batch_tokens = batch_tokens
        self._num_threads = num_threads
        self._model = _load(Path(directory), dtype=dtype, trust_remote_code=trust_remote_code)
        self._vocabulary = int(self._model.get_input_embeddings().num_embeddings)
        self.version = weights_version(Path(directory))

    def logprobs(self, examples: Sequence[Example]) -> list[float]:
        """log pi_ref of each response, summed over its tokens, in order.

        The same example is forwarded once however often it comes: small models repeat themselves.
        """
        if self._num_threads:
            # Of the calling thread: OpenMP keeps this number per thread.
            torch.set_num_threads(self._num_threads)
        keys = [(tuple(prompt), tuple(response)) for prompt, response in examples]
        different = list(dict.fromkeys(keys))
        sums: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for batch in padded_batches(
            [len(prompt) + len(response) for prompt, response in different], self._batch_tokens
        ):
            chunk = [different[index] for index in batch]
            logprobs = sequence_logprobs(self._model, chunk)
            sums |= {key: sum(values) for key, values in zip(chunk, logprobs, strict=True)}
        return [sums[key] for key in keys]

    def price(self, groups: Sequence[Group]) -> list[list[float]]:
        """`logprobs` of every candidate of several groups, in batches that cross their borders.

        Raises RecordError where a group cannot be priced: no prompt tokens, or tokens that the model does not have.
        """
        for group in groups:
            self._check(group)
        examples = [(group.prompt_tokens, candidate.tokens) for group in groups for candidate in group.candidates]
        flat = iter(self.logprobs(examples))
        return [[next(flat) for _ in group.candidates] for group in groups]

    def _check(self, group: Group) -> None:
        sequences = [group.prompt_tokens, *(candidate.tokens for candidate in group.candidates)]
        highest = max((max(tokens) for tokens in sequences if tokens), default=0)
        lowest = min((min(tokens) for tokens in sequences if tokens), default=0)
        what = None
        if not group.prompt_tokens:
            what = "has no prompt tokens"
        elif highest >= self._vocabulary or lowest < 0:
            what = f"has tokens from {lowest} to {highest}; the reference model has 0 to {self._vocabulary - 1}"
        if what:
            raise RecordError(
                f"the group {what}",
                where=f"group {group.group_id} by {group.generator}",
                do="It goes to the dead-letter topic. Check that generators and reference share a tokenizer.",
            )


def weights_version(directory: Path) -> str:
    """A hash of a model's weights and configuration: the same in every copy, another after any change."""
    files = sorted({path for pattern in _WEIGHT_FILES for path in directory.glob(pattern)})
    return stable_id("weights", [(path.name, file_sha256(path)) for path in files])


def _load(directory: Path, *, dtype: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    if not (directory / "config.json").is_file():
        raise NotReadyError(
            "is not a model directory: it has no config.json",
            where=f"reference model {directory}",
            do="Set scoring.reference to a directory in Hugging Face format, or leave it out for the initial model.",
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError) as cause:
        raise NotReadyError(
            f"did not load: {cause}", where=f"reference model {directory}", do="Check that its files are whole."
        ) from cause
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().requires_grad_(False).to(device)
