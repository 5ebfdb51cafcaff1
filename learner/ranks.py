"""The learner's processes: who am I, and how rank 0's decisions reach the others.

Control messages are msgpack bytes over gloo, on every machine: never pickles, and a waiting GPU rank does not spin.
Gradients travel in DeepSpeed's own group (nccl on GPUs, gloo on CPUs).

    connect -> share, total, gather, barrier ... -> close
"""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from streaming.errors import NotReadyError

PATIENCE = timedelta(minutes=30)
"""A rank that says nothing for so long is taken for dead. Rank 0 speaks every second, even while it has no pairs."""


class Ranks:
    """This process among the learner's processes. With one process nothing is sent anywhere."""

    def __init__(self, rank: int, world_size: int, store: dist.Store, *, local_rank: int = 0) -> None:
        self.rank = rank
        self.world_size = world_size
        has_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda", local_rank) if has_gpu else torch.device("cpu")
        if has_gpu:
            torch.cuda.set_device(self.device)
        backend = "nccl" if has_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, content: bytes | None) -> bytes:
        """What rank 0 gives (the others give None), on every rank."""
        if self.world_size == 1:
            assert content is not None, "rank 0 decides"
            return content
        length = torch.tensor([len(content or b"")])
        dist.broadcast(length, src=0, group=self._control)
        buffer = torch.empty(int(length.item()), dtype=torch.uint8)
        if content:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        if len(buffer):
            dist.broadcast(buffer, src=0, group=self._control)
        return bytes(buffer.numpy().tobytes())

    def gather(self, content: bytes) -> list[bytes]:
        """Every rank's content, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [content]
        lengths = [torch.tensor([0]) for _ in range(self.world_size)]
        dist.all_gather(lengths, torch.tensor([len(content)]), group=self._control)
        longest = max(int(length.item()) for length in lengths)
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine, group=self._control)
        return [one[: int(length.item())].numpy().tobytes() for one, length in zip(everyone, lengths, strict=True)]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The numbers summed over all ranks, on every rank."""
        if self.world_size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(summed, group=self._control)
        return [float(number) for number in summed]

    def barrier(self) -> None:
        """Return when every rank is here."""
        if self.world_size > 1:
            dist.barrier(group=self._control)

    def close(self) -> None:
        """Leave the group; the process may not train afterwards."""
        dist.destroy_process_group()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(world_size: int, environment: Mapping[str, str] = os.environ) -> Ranks:
    """This process's place, from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises NotReadyError where they are missing, or disagree with the settings.
    """
    found = int(environment.get("WORLD_SIZE", "1"))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if found != world_size or (world_size > 1 and missing):
        what = f"WORLD_SIZE is {found}, learner.world_size is {world_size}; not set: {', '.join(missing) or 'nothing'}"
        raise NotReadyError(
            what, where="environment", do="Start one process per rank with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."
        )
    rank = int(environment.get("RANK", "0"))
    store: dist.Store = dist.HashStore()  # one process needs no port: its rendezvous lies in its own memory
    if world_size > 1:
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=PATIENCE)
    return Ranks(rank, world_size, store, local_rank=local_rank(environment, torch.cuda.device_count()))


def local_rank(environment: Mapping[str, str], num_devices: int) -> int:
    """Which of the devices that it sees is this process's: LOCAL_RANK, or by RANK over nodes with as many each."""
    rank = int(environment.get("RANK", "0"))
    return int(environment.get("LOCAL_RANK", rank % max(1, num_devices)))
