"""The model's part of `streamdpo check`: its files, its kind, its tokenizer, and reward models. Loads no weights."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.prompts import Prompt, check_chat_template
from deploy.config import RunConfig
from streaming.errors import NotReadyError


def check_model(config: RunConfig, prompts: Sequence[Prompt]) -> str:
    """The model's files, its kind, its tokenizer, and that it can write these prompts."""
    check_model_files(config.model)
    settings = load_model_config(config.model, config)
    tokenizer = load_tokenizer(config)
    check_chat_template(prompts, tokenizer, model=config.model)
    notes = [f"{settings.model_type}, vocabulary {len(tokenizer)}"]
    if tokenizer.eos_token_id is None:
        raise NotReadyError(
            "the tokenizer has no end-of-sequence token, so no answer would ever end",
            where=config.model,
            do="Set eos_token in tokenizer_config.json.",
        )
    if prompts and tokenizer.chat_template and not any(prompt.messages for prompt in prompts):
        notes.append("text prompts are sampled as they are, without the model's chat template")
    if getattr(settings, "tie_word_embeddings", False):
        notes.append("tied embeddings")
    notes += _length_note(config, settings, tokenizer, prompts)
    return "; ".join(notes)


def _length_note(config: RunConfig, settings: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> list[str]:
    """A warning where the longest prompt leaves no room for a whole answer."""
    limits = [config.generation.engine.max_model_len, getattr(settings, "max_position_embeddings", None)]
    limit = min((value for value in limits if value), default=None)
    texts = [prompt.text or "".join(m.content for m in prompt.messages or []) for prompt in prompts]
    if limit is None or not texts:
        return []
    longest = len(tokenizer(max(texts, key=len))["input_ids"])
    room, wanted = limit - longest, config.generation.sampling.max_tokens
    if room >= wanted:
        return []
    return [f"the longest prompt has {longest} tokens: {max(room, 0)} of {wanted} are left for its answer"]


def check_model_files(model: str) -> None:
    """A directory must hold a model; anything else must look like a hub name."""
    path = Path(model)
    if path.is_dir():
        missing = [] if (path / "config.json").is_file() else ["config.json"]
        missing += [] if any(path.glob("*.safetensors")) else ["*.safetensors"]
        missing += [] if any(path.glob("tokenizer*")) else ["tokenizer files"]
        if missing:
            raise NotReadyError(
                f"has no {', '.join(missing)}",
                where=model,
                do="Give a directory in Hugging Face format (save_pretrained of the model and of its tokenizer).",
            )
        for file in path.glob("*.safetensors"):
            check_weights_file(file)
    elif path.is_absolute() or path.exists() or model.count("/") > 1:
        raise NotReadyError("is not a directory", where=model, do="Mend `model` in the configuration.")


def check_weights_file(path: Path) -> None:
    """The file is as long as its own header says: a copy or download that broke off is found without loading it."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, path.stat().st_size)))
        wanted = 8 + header_bytes + max(entry["data_offsets"][1] for name, entry in header.items() if name != _METADATA)
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise NotReadyError("is not a safetensors file", where=str(path), do="Copy or download it again.") from cause
    if path.stat().st_size != wanted:
        raise NotReadyError(
            f"has {path.stat().st_size} bytes, its header says {wanted}",
            where=str(path),
            do="Copy or download it again: it has broken off.",
        )


_METADATA = "__metadata__"
"""The one entry of a safetensors header that is no tensor."""


def load_model_config(model: str, config: RunConfig) -> Any:
    from transformers import AutoConfig

    return _load(AutoConfig.from_pretrained, model, config)


def load_tokenizer(config: RunConfig, model: str | None = None) -> Any:
    from transformers import AutoTokenizer

    return _load(AutoTokenizer.from_pretrained, model or config.model, config)


def _load(from_pretrained: Callable[..., Any], model: str, config: RunConfig) -> Any:
    try:
        return from_pretrained(model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as cause:
        is_here = Path(model).is_dir()
        raise NotReadyError(
            f"does not load: {cause}" if is_here else f"is no directory here, and the hub does not give it: {cause}",
            where=model,
            do="Give a directory in Hugging Face format, or a hub name that this machine can reach.",
        ) from cause


def check_reward_model(model: str, config: RunConfig, prompts: Sequence[Prompt]) -> str:
    """Its files are there, its own configuration says that it is a classifier with one output, and it can read these
    prompts."""
    check_model_files(model)
    settings = load_model_config(model, config)
    kinds = list(settings.architectures or [])
    if kinds and not any("SequenceClassification" in kind for kind in kinds) and not config.trust_remote_code:
        raise NotReadyError(f"is a {', '.join(kinds)}, no sequence classifier", where=model, do=_REWARD_MODEL)
    if settings.num_labels != 1:
        raise NotReadyError(f"has {settings.num_labels} outputs, a reward model has 1", where=model, do=_REWARD_MODEL)
    if any(prompt.messages for prompt in prompts) and not load_tokenizer(config, model).chat_template:
        raise NotReadyError(
            "its tokenizer has no chat template, but the prompts are messages: no answer would have a reward",
            where=model,
            do="Put the template that it was trained with into its directory (chat_template.jinja).",
        )
    return f"reward model {model}, {', '.join(kinds) or settings.model_type}"


_REWARD_MODEL = "Name a sequence-classification model that was trained as a reward model, with one output."
