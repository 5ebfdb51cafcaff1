"""The peer of the `loop` benchmark: TRL's OnlineDPOTrainer on the demo's task, from the same base model.

Run as a process of its own: `python -m tests.bench.trl_peer BASE_MODEL LEARNING_RATE`. Prints one JSON line:
samples and seconds to the target (evaluation and start-up left out), and the curve.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from deploy.demo_task import correct, sums

TARGET = 0.95
MAX_STEPS = 800
BATCH_SIZE = 64
EVAL_EVERY = 5
COLLAPSE_STEPS, COLLAPSED = 60, 0.1
"""A rate that has come to less than this after so many steps does not come back."""
BETA = 0.1


class Curve(TrainerCallback):  # type: ignore[misc]
    """Measures held-out reward every few steps and stops the clock while it does."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0
        self.since: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.since is None:
            self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVAL_EVERY:
            return
        assert self.since is not None
        self.seconds += time.perf_counter() - self.since
        reward = heldout_reward(model, self.tokenizer)
        samples = state.global_step * BATCH_SIZE * 2
        self.points.append({"samples": samples, "seconds": round(self.seconds, 2), "reward": round(reward, 4)})
        has_collapsed = state.global_step >= COLLAPSE_STEPS and reward < COLLAPSED
        control.should_training_stop = reward >= TARGET or has_collapsed
        self.since = time.perf_counter()


def heldout_reward(model: Any, tokenizer: Any) -> float:
    """One answer a prompt, sampled at temperature 1, as our own held-out measurement does."""
    _, heldout = sums()
    ids = torch.tensor([tokenizer(f"{a}+{b}=").input_ids for a, b in heldout])
    model.eval()
    with torch.no_grad():
        sampled = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=True,
            temperature=1.0,
            top_k=0,
        )
    texts = tokenizer.batch_decode(sampled[:, ids.shape[1] :], skip_special_tokens=True)
    model.train()
    return sum(correct([], texts, [str(a + b) for a, b in heldout])) / len(heldout)


def main(base: str, learning_rate: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    training, _ = sums()
    curve = Curve(tokenizer)
    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        reward_funcs=correct,
        args=OnlineDPOConfig(
            output_dir=str(Path(base).parent / "trl"),
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            beta=BETA,
            max_steps=MAX_STEPS,
            max_new_tokens=6,
            temperature=1.0,
            gradient_checkpointing=False,
            disable_dropout=True,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            seed=0,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in training]),
        callbacks=[curve],
    )
    started = time.perf_counter()
    trainer.train()
    last = curve.points[-1]
    result = {
        "learning_rate": learning_rate,
        "reached": last["reward"] >= TARGET,
        "samples": last["samples"],
        "seconds": last["seconds"],
        "wall_seconds": round(time.perf_counter() - started, 2),
        "curve": curve.points,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
