"""Settings of the training plane: loss, batches, optimizer, checkpoints, publishing."""

from typing import Literal

from pydantic import Field

from streaming.config import Live, Section, Step


class LossConfig(Section):
    """What the learner minimises."""

    beta: Step[float] = Field(0.1, gt=0)
    """DPO's beta: how strongly the policy is held to the reference."""

    nll_weight: Step[float] = Field(0.0, ge=0)
    """Weight of the mean-token negative log-likelihood of the chosen response, added to DPO's loss."""

    sft_weight: Step[float] = Field(1.0, ge=0)
    """Weight of an SFT example's mean-token negative log-likelihood."""


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: Step[float] = Field(1e-6, gt=0)
    """Peak learning rate. Typical: 5e-7 to 5e-6 for models of billions of parameters, 3e-4 for toy models."""

    weight_decay: Step[float] = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of its moment estimates."""

    warmup_steps: Step[int] = Field(10, ge=0)
    """Steps of linear warm-up from 0."""

    schedule: Step[Literal["constant", "cosine", "linear"]] = "constant"
    """Learning rate after the warm-up; cosine and linear fall to `final_ratio` at `max_steps`."""

    final_ratio: Step[float] = Field(0.1, ge=0, le=1)
    """Learning rate at `max_steps`, as a share of the peak."""

    gradient_clipping: Step[float] = Field(1.0, gt=0)
    """Largest gradient norm; a larger gradient is scaled down to it."""


class BatchConfig(Section):
    """Examples per step."""

    batch_size: Step[int] = Field(32, ge=1)
    """Examples per optimizer step, over all ranks."""

    micro_batch_tokens: int = Field(8192, ge=64)
    """Padded tokens per forward pass and rank; a longer example is a micro-batch of its own."""

    max_staleness: Live[int] = Field(16, ge=0)
    """Examples sampled more weight versions ago are dropped and counted (reason `stale`)."""

    max_length: int | None = Field(None, ge=8)
    """Prompt plus response tokens; a longer example is dropped (reason `too_long`). Default: what the model takes."""


class CheckpointConfig(Section):
    """Where training goes on after a crash."""

    every_steps: int = Field(50, ge=1)
    """Optimizer steps between two checkpoints."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints of the own epoch that stay."""


class PublishConfig(Section):
    """How weights reach the generators."""

    sync_every: Step[int] = Field(1, ge=1)
    """Optimizer steps between two published versions."""

    url: str | None = None
    """Where versions go for machines that do not see the run's directory: any fsspec URL (s3://BUCKET/PATH), below
    which every run and policy has a folder of its own. Default: generators read them in the run's directory."""

    keep: int = Field(3, ge=2)
    """Newest versions that stay on disk (and at `url`), beside those that a live role still names."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the published weights. Default: the learner's."""


class LearnerConfig(Section):
    """The learner."""

    world_size: int = Field(1, ge=1)
    """Ranks (processes); one GPU each where there are GPUs."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed's ZeRO stage: what the ranks share out (1 optimizer, 2 and gradients, 3 and parameters). bfloat16 takes
    at least 2."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters in the forward pass. bfloat16 keeps float32 master weights."""

    seed: int = 0
    """Seed of everything random in the learner."""

    num_threads: int | None = Field(None, ge=1)
    """CPU threads of each rank. Default: what torch chooses."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps after which the run ends. Default: no limit; needed by the cosine and linear schedules."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""

    loss: LossConfig = LossConfig()
    """What the learner minimises."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""

    batch: BatchConfig = BatchConfig()
    """Examples per step."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Where training goes on after a crash."""

    publish: PublishConfig = PublishConfig()
    """How weights reach the generators."""

    @property
    def effective_zero_stage(self) -> int:
        """What DeepSpeed is told: from ZeRO 2 on it sums micro-batches of bfloat16 in float32.

        In ZeRO 1 it does so too, through another, slower optimizer.
        """
        return max(self.zero_stage, 2) if self.dtype == "bfloat16" else self.zero_stage
