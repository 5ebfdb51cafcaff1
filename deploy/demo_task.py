"""The demo's task: two-digit additions, a base model that knows them but answers noisily, and the reward.

The base model is trained on sums of which half are wrong in one digit, so its greedy answer is right and its
sampled answer is right about half of the time: online DPO has to sharpen it, and everyone can check the reward.
"""

import itertools
import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.tiny_model import build_model, build_tokenizer
from streaming.records import stable_id

HIDDEN_SIZE = 192
NUM_LAYERS = 4
MAX_STEPS = 220
DECAY_STEPS = 80
"""Steps over which the learning rate falls to 0 at the end: it is then that the model learns to carry."""
DECAY_LOSS = 1.0
"""Smoothed loss (nats a token) at which the fall begins; when it comes is luck, and MAX_STEPS is the latest."""
SMOOTHING = 0.95
BATCH_SIZE = 256
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
WRONG_SHARE = 0.5
"""Share of wrong answers in the supervised data: what leaves the model something to learn."""
NUM_HELDOUT = 256
SEED = 0

Sum = tuple[int, int]


def correct(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: object) -> list[float]:
    """1 for the right sum and nothing else, 0 otherwise. The signature is that of TRL's reward functions."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def sums() -> tuple[list[Sum], list[Sum]]:
    """All additions of two two-digit numbers, shuffled: (training, held out), without overlap."""
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(SEED).shuffle(every)
    return every[NUM_HELDOUT:], every[:NUM_HELDOUT]


def write_prompts(folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl and heldout.jsonl and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "train.jsonl", folder / "heldout.jsonl")
    for path, part in zip(paths, sums(), strict=True):
        path.write_text("".join(json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in part))
    return paths


def base_model(cache: Path, *, report: Callable[[str], None]) -> Path:
    """The directory of the base model, trained now unless `cache` holds it. Tells its progress to `report`."""
    recipe = (HIDDEN_SIZE, NUM_LAYERS, MAX_STEPS, DECAY_STEPS, DECAY_LOSS, BATCH_SIZE, LEARNING_RATE, WRONG_SHARE, SEED)
    directory = cache / f"base-{stable_id(*recipe)}"
    if (directory / "config.json").exists():
        report(f"base model: {directory} (made by an earlier run)")
        return directory
    report("base model: training on noisy sums (about a minute on 2 cores, once) ...")
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    train(partial, report=report)
    partial.rename(directory)
    return directory


def train(directory: Path, *, report: Callable[[str], None]) -> None:
    """Supervised training of a 1.9-million-parameter Llama on noisy sums; writes a Hugging Face directory."""
    import torch

    tokenizer = build_tokenizer(chat_template=False)
    model = build_model(tokenizer, hidden_size=HIDDEN_SIZE, num_layers=NUM_LAYERS, seed=SEED)
    optimizers = _optimizers(model)
    rng = random.Random(SEED)
    training, _ = sums()
    smoothed, last_step = 4.0, MAX_STEPS + DECAY_STEPS  # nearly the loss of an untrained model
    for step in itertools.count(1):
        if step > last_step:
            break
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP_STEPS, (last_step - step + 1) / DECAY_STEPS)
        texts = [_noisy(rng, *rng.choice(training)) for _ in range(BATCH_SIZE)]
        rows = [[*tokenizer(prompt + answer).input_ids, tokenizer.eos_token_id] for prompt, answer in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        labels = torch.tensor(
            [
                [-100] * len(prompt) + row[len(prompt) :] + [-100] * (width - len(row))
                for row, (prompt, _) in zip(rows, texts, strict=True)
            ]
        )
        loss = model(ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        smoothed = SMOOTHING * smoothed + (1 - SMOOTHING) * loss.item()
        if smoothed < DECAY_LOSS:
            last_step = min(last_step, step + DECAY_STEPS)
        if step % 100 == 0:
            report(f"base model: step {step} of at most {last_step}, loss {smoothed:.3f}")
    with _quietly():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bar for a single file, and what DeepSpeed, which it imports then, says about GPUs."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.disabled = True
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
        deepspeed.disabled = False


def _optimizers(model: Any) -> list[Any]:
    """Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for the rest: a third of AdamW's steps on this task."""
    import torch

    blocks = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in blocks}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(blocks, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def _noisy(rng: random.Random, a: int, b: int) -> tuple[str, str]:
    """(prompt, answer); the answer is wrong in one digit with probability WRONG_SHARE. One character, one token."""
    answer = str(a + b)
    if rng.random() < WRONG_SHARE:
        place = rng.randrange(len(answer))
        other = rng.choice([digit for digit in "0123456789" if digit != answer[place]])
        answer = answer[:place] + other + answer[place + 1 :]
    return f"{a}+{b}=", answer
