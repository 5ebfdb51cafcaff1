"""Weight versions as the learner publishes them, of tiny models whose log-probs are far from uniform."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from deploy.tiny_model import build_model, build_tokenizer
from streaming.logprobs import sequence_logprobs
from streaming.records import Probe, Version, WeightVersion
from streaming.weights import write_manifest
from tests.builders import make_weights, tokens_of

PROBE = (tokens_of("12+34="), tokens_of("46 and some more of it"))
"""Prompt and response of every probe."""


def publish(
    folder: Path, version: Version, *, seed: int = 0, tied: bool = False, chat_template: bool = True
) -> WeightVersion:
    """A random model of this seed, complete with tokenizer, manifest and probe, in folder/EPOCH.NUMBER."""
    directory = folder / str(version)
    tokenizer = build_tokenizer(chat_template=chat_template)
    model = build_model(tokenizer, tied=tied, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)  # an untrained model is too close to uniform to tell versions apart
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    prompt, response = PROBE
    return make_weights(
        version,
        location=str(directory),
        manifest_sha256=write_manifest(directory, version),
        probe=Probe(
            prompt_tokens=prompt, response_tokens=response, logprobs=sequence_logprobs(model, [(prompt, response)])[0]
        ),
    )


def load_published(weights: WeightVersion) -> Any:
    """The published model, as anybody would load it."""
    return AutoModelForCausalLM.from_pretrained(weights.location, dtype=torch.float32)
