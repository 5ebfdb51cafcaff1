"""Small Llama models with a character tokenizer, complete in Hugging Face format: for the demo and for tests.

They are real models: vLLM, transformers and DeepSpeed load them as they load any other.
"""

from pathlib import Path
from typing import Any

CHARACTERS = "0123456789+-*/=?.,:;!'()<>|_\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Everything the tokenizer knows; any other character becomes <unk>."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tokenizer(*, chat_template: bool = True) -> Any:
    """A fast tokenizer with one token per character, and <pad>, <eos> and <unk>. It adds no special tokens itself."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(
    tokenizer: Any, *, hidden_size: int = 64, num_layers: int = 2, num_heads: int = 2, tied: bool = False, seed: int = 0
) -> Any:
    """A randomly initialised float32 Llama for this tokenizer.

    vLLM's CPU attention takes head sizes (hidden_size / num_heads) of 32, 64, 80, 96, 112, 128 and more, not 16 or 48.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 3,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=tied,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return model


def save_tiny_model(directory: Path, *, chat_template: bool = True, tied: bool = False, seed: int = 0) -> Path:
    """Write an untrained model of about 100,000 parameters, with its tokenizer, and return its directory."""
    tokenizer = build_tokenizer(chat_template=chat_template)
    build_model(tokenizer, tied=tied, seed=seed).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
