"""DeepSpeed, and nothing of it elsewhere: backward over micro-batches, the optimizer step, saving and loading.

DeepSpeed owns the parameters' partitioning (ZeRO), the reduction of gradients over ranks, float32 masters of bfloat16
parameters, and the checkpoint. Ours are: the accumulation boundary (a step has as many micro-batches as its examples
need), the loss's scale (a mean over the step's examples on all ranks), the learning rate, and the veto on a step.
Checkpoints are DeepSpeed's `save_checkpoint` and `load_checkpoint` through a storage engine of ours, which writes
safetensors instead of pickles (their names keep DeepSpeed's ending `.pt`); whoever loads has compared the hashes.

    Engine -> (accumulate ... -> step) ... -> save | load -> close
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.ranks import Ranks
from learner.tree_file import read_tree, write_tree
from streaming.errors import NotReadyError

if not torch.cuda.is_available():
    # DeepSpeed chooses its accelerator while it is imported.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

_TAG = "engine"
"""Folder of DeepSpeed's files inside a checkpoint."""

_LEFT_OUT = frozenset({"loss_scaler", "param_slice_mappings", "ds_config"})
"""Parts of DeepSpeed's state that are objects or settings; it makes them anew from the configuration."""

_BUCKET_ELEMENTS = 50_000_000
"""Gradient elements reduced at once. DeepSpeed's default (5e8) reserves 2 GB a process, and 3 s of a CPU's start."""


class StepResult(NamedTuple):
    """What an optimizer step did."""

    applied: bool  # False: some gradient was not finite, and nothing changed
    gradient_norm: float | None  # before clipping; None where it was not finite


class Engine:
    """A model in training. Every rank calls every method, in the same order."""

    def __init__(self, model: Any, config: LearnerConfig, ranks: Ranks) -> None:
        self._ranks = ranks
        self._clipping = config.optimizer.gradient_clipping
        self._betas = config.optimizer.betas
        self._optimizer = _VetoAdamW(_parameter_groups(model), betas=self._betas, fused=True)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # The shared-memory collective takes 20 s to compile, and its peers spin for ever once a rank was killed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", str(ranks.device.index or 0))
        settings = _settings(config)
        if config.effective_zero_stage == 3:
            _share_out(model, settings, ranks.device)
        self.model, _, _, _ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=settings, dist_init_required=False
        )
        self.model.checkpoint_engine = _SafetensorsStorage(getattr(self.model.optimizer, "loss_scaler", None))
        self._is_plain = not self.model.zero_optimization()
        # One rank has nothing to reduce, and DeepSpeed would copy every gradient to find that out.
        self.model.enable_backward_allreduce = not self._is_plain or ranks.world_size > 1

    def accumulate(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of one micro-batch; the last one of a step also reduces them over the ranks.

        The sum of `loss` over all micro-batches and ranks is what the step minimises.
        """
        self.model.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over ranks.
        self.model.backward(loss * self._ranks.world_size)

    def step(self, *, learning_rate: float, weight_decay: float, is_vetoed: bool) -> StepResult:
        """Update the parameters, or change nothing where the step is vetoed or a gradient is not finite.

        Either way the gradients are gone afterwards, and all ranks did the same.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = weight_decay if group["is_decayed"] else 0.0
        norm = self._clip() if self._is_plain else None
        self._optimizer.is_vetoed = is_vetoed or (norm is not None and not torch.isfinite(norm).item())
        self.model.step()
        if norm is None:
            norm = torch.as_tensor(self.model.get_global_grad_norm())
        applied = not self._optimizer.is_vetoed and self.model.was_step_applied()
        is_finite = bool(torch.isfinite(norm).item()) and float(norm) >= 0
        return StepResult(applied, float(norm) if is_finite else None)

    def _clip(self) -> Tensor:
        # Without ZeRO, DeepSpeed clips but does not tell the norm.
        return torch.nn.utils.clip_grad_norm_(self.model.module.parameters(), self._clipping)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's state, by name; every rank takes all of it, in step. Tied weights come as one tensor.

        Under ZeRO 3 a tensor is whole only until the next one is taken: the model may not fit into one device.
        """
        for name, tensor in self.model.module.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([tensor], modifier_rank=None, enabled=self._is_partitioned):
                yield name, tensor

    @property
    def _is_partitioned(self) -> bool:
        return bool(self.model.zero_optimization_partition_weights())

    def save(self, directory: Path) -> list[Path]:
        """Write this rank's part of the state below `directory`, and return its files. Durable they are not yet."""
        storage: _SafetensorsStorage = self.model.checkpoint_engine
        storage.written.clear()
        self.model.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
        return list(storage.written)

    def load(self, directory: Path) -> None:
        """Go on from the state in `directory`, whose hashes the caller has compared. Only right after the start."""
        found, _ = self.model.load_checkpoint(str(directory), tag=_TAG)
        if found is None:
            raise NotReadyError("holds no state of the engine", where=str(directory), do="Delete this checkpoint.")
        # torch and ZeRO bring back what they were told then; the settings are what counts now.
        for group in self._optimizer.param_groups:
            group["betas"] = self._betas
        if not self._is_plain:
            self.model.optimizer.clip_grad = self._clipping

    def close(self) -> None:
        """Free what DeepSpeed holds."""
        self.model.destroy()


class _VetoAdamW(torch.optim.AdamW):  # type: ignore[misc]
    """AdamW whose next step can be forbidden: DeepSpeed then does all its bookkeeping, and nothing changes."""

    is_vetoed = False

    def step(self, closure: Any = None) -> Any:
        return None if self.is_vetoed else super().step(closure)


class _SafetensorsStorage(CheckpointEngine):  # type: ignore[misc]
    """Where DeepSpeed's checkpoints go: trees of tensors in safetensors files."""

    def __init__(self, loss_scaler: Any) -> None:
        super().__init__()
        self._loss_scaler = loss_scaler
        self.written: list[Path] = []

    def create(self, info: Any) -> None:
        """DeepSpeed begins a checkpoint: nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        write_tree(Path(path), _without_objects(state_dict))
        self.written.append(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        tree = read_tree(Path(path))
        if "optimizer_state_dict" in tree:  # ZeRO 3 insists on the object
            tree["optimizer_state_dict"]["loss_scaler"] = self._loss_scaler
        return tree

    def commit(self, info: Any) -> bool:
        return True  # the learner's manifest is the commit


def _without_objects(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_objects(value) for key, value in tree.items() if key not in _LEFT_OUT}
    return tree


def _parameter_groups(model: Any) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms and biases) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2], "is_decayed": True},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "is_decayed": False},
    ]


def _share_out(model: Any, settings: dict[str, Any], device: torch.device) -> None:
    """Leave every rank its part of each parameter. `initialize` alone moves the whole model to the device first."""
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)


def _settings(config: LearnerConfig) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    is_bfloat16 = config.dtype == "bfloat16"
    stage = config.effective_zero_stage
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the boundary is ours: set_gradient_accumulation_boundary
        "gradient_clipping": config.optimizer.gradient_clipping if stage else 0.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,  # it does not know that _VetoAdamW is torch's AdamW
        "bf16": {"enabled": is_bfloat16},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if is_bfloat16 else {}),
        "steps_per_print": None,
    }
