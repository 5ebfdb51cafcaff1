"""The model in training: loading it, and what it says about a micro-batch.

Dropout is off: DPO compares log-probs with those of the sampled responses, and noise in them is noise in the margin.
"""

from typing import Any

import torch

from learner.batch import MicroBatch
from learner.losses import Side
from streaming.errors import NotReadyError
from streaming.logprobs import forward_logprobs


def load_model(location: str, *, dtype: str, gradient_checkpointing: bool, trust_remote_code: bool) -> Any:
    """A Hugging Face causal language model, ready to train.

    Raises NotReadyError where there is none at `location`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            location, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as cause:
        raise NotReadyError(
            f"no model could be loaded: {cause}", where=location, do="Give a directory in Hugging Face format."
        ) from cause
    _switch_off_dropout(model)
    model.train()  # gradient checkpointing works in training mode only
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _switch_off_dropout(model: Any) -> None:
    """Wherever a rate of it may stand: in a module of its own, with the module that drops, or in its configuration."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            there = getattr(holder, "__dict__", {})
            for name in [name for name, value in there.items() if "drop" in name and isinstance(value, float)]:
                setattr(holder, name, 0.0)


def max_length(model: Any) -> int | None:
    """Tokens that the model takes in one sequence; None where its configuration does not say."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def price(model: Any, batch: MicroBatch) -> tuple[Side, Side]:
    """Chosen and rejected of every example, in one differentiable forward pass."""
    gathered = forward_logprobs(model, batch.tokens)
    num_rows = len(batch.weight_B)
    chosen = Side(gathered.sums_B[:num_rows], batch.reference_chosen_B, gathered.lengths_B[:num_rows])
    policy_B = torch.where(batch.is_pair_B, gathered.sums_B[batch.rejected_of_B], 0.0)
    length_B = torch.where(batch.is_pair_B, gathered.lengths_B[batch.rejected_of_B], 0)
    return chosen, Side(policy_B, batch.reference_rejected_B, length_B)


def vocabulary_size(model: Any) -> int:
    """Tokens that the model knows."""
    return int(model.get_input_embeddings().num_embeddings)
