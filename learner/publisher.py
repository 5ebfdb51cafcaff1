"""Weight versions for the generators: written, made durable, announced, and removed when nobody needs them.

    gathered (all ranks) -> copied -> written (a complete Hugging Face directory) -> manifest -> announced -> pruned

Training goes on while a version is written: from the copy on, a thread does the rest, one version at a time. A version
is announced only when every byte of it is durable, and a directory is removed only when it is none of the newest and
no live role leases it.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from learner.claim import Claim
from streaming import topics
from streaming.errors import NotReadyError
from streaming.fencing import epoch_key
from streaming.heartbeat import role_states
from streaming.kept import leased, parse_version, prunable
from streaming.log.protocol import Log, Output
from streaming.records import Probe, Version, WeightVersion, encode
from streaming.remote_weights import RemoteWeights
from streaming.weights import write_manifest

_MAX_SHARD = "1000GB"
"""One file a version, whatever its size: a reader maps it, and there is one hash to compare."""

_NOT_COPIED = re.compile(
    r"\..*|.*\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack|md)|.*\.index\.json|manifest\.json|trainer_state\.json"
)
"""Files of the initial model that do not belong to a version: weights of any format, and records about them."""


class Publisher:
    """Publishes the versions of one policy into ROOT/EPOCH.NUMBER/. Lives on rank 0."""

    def __init__(
        self,
        root: Path,
        log: Log,
        claim: Claim,
        *,
        policy: str,
        source: Path,
        keep: int,
        dtype: str | None,
        announced: Callable[[WeightVersion], None],
        remote: RemoteWeights | None = None,
    ) -> None:
        """`source` is the initial model's directory; `announced` hears of every version, in the writing thread.

        With `remote` versions are uploaded too, and announced from there.
        """
        self._root = root
        self._log = log
        self._claim = claim
        self._policy = policy
        self._source = source
        self._keep = keep
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self._announced = announced
        self._remote = remote
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self._under_way: Future[None] | None = None

    def publish(
        self,
        model: Any,
        weights: Iterable[tuple[str, Tensor]],
        version: Version,
        *,
        step: int,
        lineage: list[Version],
        probe: Probe | None,
    ) -> None:
        """Copy the weights and have them published; waits for the version before. Raises what failed of that one."""
        self.wait()
        copies = snapshot(weights, self._dtype)
        record = WeightVersion(
            policy=self._policy,
            version=version,
            location=str((self._root / str(version)).resolve()),
            manifest_sha256="",
            step=step,
            lineage=lineage,
            probe=probe,
            fences=self._claim.fences,
        )
        self._under_way = self._worker.submit(self._publish, model, copies, record)

    def wait(self) -> None:
        """Return when nothing is under way. Raises NotReadyError where the newest version could not be written."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def look(self) -> None:
        """As `wait`, where that returns at once: so that nobody waits for ever for a version that failed."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def close(self) -> None:
        """Finish what is under way."""
        self._worker.shutdown()
        self.wait()

    def prune(self, *, now_s: float) -> None:
        """Remove what is neither among the newest nor leased by a live role."""
        there = {version: self._root / str(version) for version in _versions(self._root)}
        leases = leased(role_states(self._log).values(), now_s=now_s)
        for version in prunable(there, leases, keep=self._keep):
            # Asked before each one: who stood still since the look would remove what was leased meanwhile.
            self._claim.refuse_to_be_second()
            # An older epoch that is not dead yet may still be writing into its own: what stays now goes with the next.
            try:
                shutil.rmtree(there[version], ignore_errors=version.epoch < self._claim.epoch)
            except FileNotFoundError:
                self._claim.refuse_to_be_second()  # an heir removes what an older epoch keeps
                raise
        if self._remote is not None:
            self._prune_remote(self._remote, leases)

    def _prune_remote(self, remote: RemoteWeights, leases: set[Version]) -> None:
        for version in prunable(remote.versions(), leases, keep=self._keep):
            self._claim.refuse_to_be_second()
            remote.remove(version)

    def _publish(self, model: Any, weights: dict[str, Tensor], record: WeightVersion) -> None:
        directory = Path(record.location)
        self._claim.refuse_to_be_second()
        try:
            shutil.rmtree(directory, ignore_errors=True)  # what a start that failed may have left
            directory.mkdir(parents=True)
            self._write(model, weights, directory)
            manifest_sha256 = write_manifest(directory, record.version)
        except OSError as cause:
            self._claim.refuse_to_be_second()  # an heir removes what an older epoch writes
            raise NotReadyError(
                f"version {record.version} could not be written: {cause}",
                where=str(directory),
                do="Free space or mend the disk, and run again: training goes on from the newest checkpoint.",
            ) from cause
        if self._remote is not None:
            location = self._remote.upload(directory, record.version, manifest_sha256)
            record = msgspec.structs.replace(record, location=location)
        record = msgspec.structs.replace(record, manifest_sha256=manifest_sha256, time_s=time.time())
        key = epoch_key(f"{self._policy}/{record.kind}", record.version.epoch)
        self._claim.refuse_to_be_second()
        self._log.append([Output(topics.WEIGHTS.name, key, encode(record))])
        self._announced(record)
        self.prune(now_s=record.time_s)

    def _write(self, model: Any, weights: dict[str, Tensor], directory: Path) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        model.save_pretrained(directory, state_dict=weights, max_shard_size=_MAX_SHARD)
        for path in self._source.iterdir():
            if path.is_file() and not _NOT_COPIED.fullmatch(path.name):
                shutil.copyfile(path, directory / path.name)
        dtype = self._dtype or model.dtype
        _set_dtype(directory / "config.json", str(dtype).removeprefix("torch."))


def snapshot(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A copy of the weights on the CPU, floating ones as `dtype`. What is one tensor stays one (tied weights)."""
    copies: dict[Tensor, Tensor] = {}  # a tensor is its own key: where it lies may change between two of them
    taken: dict[str, Tensor] = {}
    for name, tensor in weights:
        if tensor not in copies:
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            copies[tensor] = tensor.detach().to("cpu", kind, copy=True)
        taken[name] = copies[tensor]
    return taken


def _versions(root: Path) -> list[Version]:
    found = [parse_version(path.name) for path in root.iterdir()] if root.exists() else []
    return [version for version in found if version is not None]


def _set_dtype(path: Path, dtype: str) -> None:
    """Let the configuration name the type of the weights beside it."""
    config = msgspec.json.decode(path.read_bytes())
    config.pop("torch_dtype", None)  # the name before transformers 5
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config | {"dtype": dtype}), indent=2))
