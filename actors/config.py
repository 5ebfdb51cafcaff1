"""Settings of the generation plane: prompts, pacing, sampling, the engine."""

from typing import Literal

from pydantic import Field

from streaming.config import Live, Section


class PromptsConfig(Section):
    """Where prompts come from."""

    path: str
    """Training prompts: a .jsonl, .json, .parquet or .csv file, a directory saved by `datasets`, or a hub name.
    A row has `prompt` (text, or a list of messages as in TRL's conversational format), optionally `golden`; every
    other column goes to the reward functions by its name."""

    eval_path: str | None = None
    """Held-out prompts, never trained on. Default: none, so the run measures no held-out reward."""

    split: str = "train"
    """Split of a hub data set or saved DatasetDict that `path` names."""

    eval_split: str = "test"
    """Split of a hub data set or saved DatasetDict that `eval_path` names."""

    prompt_column: str = "prompt"
    """Column that holds the prompt."""

    golden_column: str | None = None
    """Column with a known good answer. Default: none."""

    max_passes: float | None = Field(None, gt=0)
    """Passes over the training prompts before the run ends. Default: cycle until another limit passes."""

    shuffle_seed: int | None = 0
    """Seed of the order of each pass; null keeps the file's order."""

    max_eval_prompts: int = Field(256, ge=1)
    """Held-out prompts of a measurement at most; the first ones of the file, always the same."""


class SamplingConfig(Section):
    """How candidates are drawn."""

    num_candidates: Live[int] = Field(2, ge=1, le=256)
    """Candidates per prompt (N)."""

    temperature: Live[float] = Field(1.0, ge=0)
    """Sampling temperature; recorded log-probs are the model's own, before temperature."""

    top_p: Live[float] = Field(1.0, gt=0, le=1)
    """Nucleus sampling threshold."""

    top_k: Live[int] = Field(0, ge=0)
    """Sample from the k most likely tokens; 0 means all."""

    max_tokens: Live[int] = Field(256, ge=1)
    """Longest response, in tokens."""

    stop: Live[list[str]] = []
    """Texts that end a response, beside the model's end-of-sequence token."""


class EngineConfig(Section):
    """The engine that samples."""

    kind: Literal["vllm", "transformers"] = "vllm"
    """vllm: fast, in-flight weight updates. transformers: `generate`, for machines where vLLM does not install."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the engine's weights."""

    max_model_len: int | None = Field(None, ge=8)
    """Longest prompt plus response, in tokens. Default: what the model's configuration says."""

    kv_cache_bytes: int | None = Field(None, ge=1024 * 1024)
    """Memory of the KV cache, in bytes. Default: 256 MiB on CPU, vLLM's own choice on a GPU."""

    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Share of the GPU's memory that vLLM takes (GPU only)."""

    max_num_seqs: int = Field(128, ge=1)
    """Sequences sampled at once."""

    enforce_eager: bool = True
    """Skip torch.compile and CUDA graphs: starts faster; on a GPU, false samples faster."""

    num_threads: int | None = Field(None, ge=1)
    """CPU threads of the engine. Default: what torch chooses."""

    parity_tolerance: float = Field(1e-3, gt=0)
    """Largest log-prob difference to the learner at the probe (nats) before an update counts as failed. bfloat16
    needs about 0.1."""


class GenerationConfig(Section):
    """The generators."""

    num_generators: int = Field(1, ge=1)
    """Generator processes."""

    concurrency: Live[int] = Field(64, ge=1)
    """Groups that one generator keeps in flight."""

    sampling: SamplingConfig = SamplingConfig()
    """How candidates are drawn."""

    engine: EngineConfig = EngineConfig()
    """The engine that samples."""

    weights_cache: str | None = None
    """Directory on each machine's own disk for versions that are published behind a URL (learner.publish.url).
    Default: the operating system's directory for temporary files."""

    keep_weights: int = Field(2, ge=2)
    """Newest versions that stay in `weights_cache`, beside those that a live role still names."""

    drain_s: float = Field(0.0, ge=0)
    """Seconds in which a generator that is told to stop (SIGTERM: a node that is drained or preempted) finishes what
    is in flight; it takes no more prompts. What is not finished by then is sampled again elsewhere: nothing is lost."""

    update_weights: bool = True
    """Follow the learner's published weights; false samples from the initial model for ever."""


class SchedulerConfig(Section):
    """How prompts are paced."""

    pipeline_depth: Live[int] = Field(128, ge=1)
    """Requests issued and not yet ended, at most. It bounds staleness: nothing is ever further ahead."""

    eval_every: Live[int] = Field(8, ge=1)
    """Weight versions between two held-out measurements."""

    max_requests: int | None = Field(None, ge=1)
    """Training requests after which the run ends. Default: no limit."""
