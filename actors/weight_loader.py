"""What runs inside vLLM's own processes: reading a published version's files and loading all of it, or failing.

vLLM finds `register` through the entry point `vllm.general_plugins` in every process that it starts. The files were
verified against their manifest before the engine was paused; here they only have to fill every parameter.

    start_weight_update -> update_weights({"directory": ...}) -> finish_weight_update
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from actors.engine import OWNED
from streaming.errors import WeightsError

BACKEND = "streamdpo_safetensors"
"""Name of the transfer backend, in vLLM's registry and in WeightTransferConfig."""


def register() -> None:
    """Make the backend known to this process. vLLM may call it several times."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    # It warns of every layer that loads nothing of its own, at every update; what is really missing raises below.
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    WeightTransferEngineFactory.register_engine(BACKEND, SafetensorsTransfer)
    parent = multiprocessing.parent_process()
    if parent is not None and OWNED in os.environ:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    """End this process when its parent is gone. vLLM 0.32 does not: a killed generator left its engine behind."""
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class NoConnection(WeightTransferInitInfo):  # type: ignore[misc]
    """Files need no rendezvous."""


@dataclass
class Location(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Where the new weights lie."""

    directory: str


class SafetensorsTransfer(WeightTransferEngine):  # type: ignore[misc]
    """Loads a whole model from the safetensors files of a directory. Raises where one parameter is left without."""

    init_info_cls = NoConnection
    update_info_cls = Location

    def init_transfer_engine(self, init_info: NoConnection) -> None:
        return

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        # Named now: on the meta device tied parameters are no longer one, and the head would seem to be missing.
        self._expected = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":  # vLLM's own method synchronises always, which raises on CPU (0.32)
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Location) -> None:
        loaded = self.model.load_weights(_tensors(Path(update_info.directory)))
        missing = self._expected - loaded if loaded is not None else set()
        if missing:
            # vLLM only warns and keeps the old values, and the new version's name would stand for a mixture.
            raise WeightsError(
                f"{len(missing)} of {len(self._expected)} parameters are not in it, e.g. {min(missing)}",
                where=update_info.directory,
                do="Publish a complete model.",
            )

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._repack_heads()

    def shutdown(self) -> None:
        return

    def _repack_heads(self) -> None:
        """Pack the output heads again.

        On CPU a head multiplies with a packed copy of its weights. A tied head loads nothing of its own, so vLLM
        0.32 keeps the copy of the version before: log-probs were wrong by up to 11 nats.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


def _tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the directory by its Hugging Face name, one at a time."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
