"""Prompts to tokens and tokens to text, with the model's own tokenizer: the same for every engine."""

from pathlib import Path
from typing import Any

from streaming.errors import DataError
from streaming.records import PromptRequest


def tokenize(tokenizer: Any, request: PromptRequest) -> list[int]:
    """The tokens that the model sees: the chat template's for messages, the tokenizer's for plain text.

    Raises DataError where the request has messages and the model no chat template.
    """
    if request.messages is None:
        return list(tokenizer(request.text or "").input_ids)
    if tokenizer.chat_template is None:
        raise DataError(
            "the prompt is a list of messages, but the model has no chat template",
            where=f"prompt {request.prompt_id}",
            do="Use a model with a chat template in its tokenizer, or write the prompts as plain text.",
        )
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def response_text(tokenizer: Any, tokens: list[int], stop: list[str]) -> str:
    """A response for people and reward functions: without special tokens, and cut before the first stop text."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    cuts = [at for text_at in stop if (at := text.find(text_at)) >= 0]
    return text[: min(cuts)] if cuts else text


def load_tokenizer(directory: Path, *, trust_remote_code: bool) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def eos_tokens(directory: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a response: those of the generation settings, else the tokenizer's."""
    from transformers import GenerationConfig

    found: Any = None
    if (directory / "generation_config.json").exists():
        found = GenerationConfig.from_pretrained(directory).eos_token_id
    tokens = found if isinstance(found, list) else [found]
    return frozenset(int(token) for token in [*tokens, tokenizer.eos_token_id] if token is not None)
