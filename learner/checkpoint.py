"""Checkpoints: the model, the optimizer and the place in the log, committed as one.

    engine files and RNG of every rank (durable) -> state (durable) -> manifest with all hashes (the commit)

    ROOT/epoch-E/step-N/    engine/...  rank-R.msgpack  state.msgpack  manifest.json

A directory without a manifest never counts, so a crash at any moment leaves the checkpoint before it as the newest.
Each start of the learner writes into its own epoch and prunes only there: nothing that an older epoch committed is
lost by a start that goes wrong.
"""

import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from learner.pairs import ReaderState
from learner.ranks import Ranks
from streaming.errors import ConfigError
from streaming.records import Feedback, Version
from streaming.weights import FileEntry, file_sha256, sync_directory, sync_file, write_durably

MANIFEST = "manifest.json"
STATE = "state.msgpack"
FORMAT = 1

_STEP = re.compile(r"step-(\d+)(?:\.(\d+))?")
_EPOCH = re.compile(r"epoch-(\d+)")


class Layout(msgspec.Struct, frozen=True):
    """How the engine's state is divided; a checkpoint is restored into the same layout."""

    world_size: int
    zero_stage: int
    dtype: str


class ProbeTokens(msgspec.Struct, frozen=True):
    """The sequence that published versions are compared on."""

    prompt: list[int]
    response: list[int]


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What the learner knows beside the engine's tensors."""

    step: int
    version: Version
    lineage: list[Version]
    layout: Layout
    reader: ReaderState
    endings: list[Feedback]  # became final with this checkpoint; written after it, and again by whoever resumes
    probe: ProbeTokens | None = None
    format: int = FORMAT


class Manifest(msgspec.Struct, frozen=True):
    """Every file of a checkpoint."""

    epoch: int
    step: int
    files: dict[str, FileEntry]


class Savable(Protocol):
    """What the checkpoint needs of the engine."""

    def save(self, directory: Path) -> list[Path]: ...


class Checkpoint(msgspec.Struct, frozen=True):
    """A checkpoint whose hashes were compared."""

    directory: Path
    state: State


def save(root: Path, state: State, engine: Savable, ranks: Ranks, *, keep: int) -> Path:
    """Write and commit a checkpoint, then remove the oldest of this epoch beyond `keep`. Every rank calls it."""
    directory = root / ranks.share(_make(root, state).encode() if ranks.is_first else None).decode()
    files = engine.save(directory)
    own = directory / f"rank-{ranks.rank}.msgpack"
    own.write_bytes(msgspec.msgpack.encode(_random_state()))
    everyone = ranks.gather(msgspec.msgpack.encode(_describe(directory, [*files, own])))
    if ranks.is_first:
        write_durably(directory / STATE, msgspec.msgpack.encode(state))
        described = [msgspec.msgpack.decode(one, type=dict[str, FileEntry]) for one in everyone]
        described.append(_describe(directory, [directory / STATE]))
        manifest = Manifest(state.version.epoch, state.step, {name: one for d in described for name, one in d.items()})
        write_durably(directory / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        _prune(directory.parent, keep)
    ranks.barrier()
    return directory


def newest(root: Path) -> Checkpoint | None:
    """The newest committed checkpoint of any epoch that is whole.

    A damaged one is passed over with a warning: training goes on from the one before it, and what came after is
    trained again.
    """
    for directory in _committed(root):
        problem = _problem(directory)
        if problem is None:
            content = (directory / STATE).read_bytes()
            return Checkpoint(directory, msgspec.msgpack.decode(content, type=State))
        warnings.warn(f"checkpoint {directory} is passed over: {problem}", stacklevel=2)
    return None


def newest_epoch(root: Path) -> int:
    """The newest epoch that has a directory here, committed or not; 0 for none."""
    return max((number for number, _ in _numbered(root, _EPOCH)), default=0)


def check_layout(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raises ConfigError where the checkpoint cannot be restored into this layout.

    Without ZeRO every rank holds everything, so the number of ranks may change.
    """
    found = checkpoint.state.layout
    same_ranks = found.world_size == layout.world_size or found.zero_stage == layout.zero_stage == 0
    if (found.zero_stage, found.dtype) != (layout.zero_stage, layout.dtype) or not same_ranks:
        raise ConfigError(
            f"the checkpoint has {found}, the settings say {layout}",
            where=str(checkpoint.directory),
            do="Set learner.world_size, zero_stage and dtype as they were, or start a new run from its newest weights.",
        )


def restore_random_state(checkpoint: Checkpoint, rank: int) -> None:
    """Set this rank's random number generators as they were; a rank that is new keeps its own."""
    path = checkpoint.directory / f"rank-{rank}.msgpack"
    if not path.exists():
        return
    state = msgspec.msgpack.decode(path.read_bytes(), type=dict[str, bytes])
    torch.set_rng_state(torch.frombuffer(bytearray(state["cpu"]), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(state["cuda"]), dtype=torch.uint8))


def _random_state() -> dict[str, bytes]:
    state = {"cpu": torch.get_rng_state().numpy().tobytes()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return state


def _make(root: Path, state: State) -> str:
    """A new directory for this step, by its name below `root`.

    A step may be saved twice: no step is taken between, but pairs were dropped.
    """
    epoch = root / f"epoch-{state.version.epoch}"
    names = [f"step-{state.step}", *(f"step-{state.step}.{again}" for again in range(1, 1000))]
    directory = next(epoch / name for name in names if not (epoch / name).exists())
    directory.mkdir(parents=True)
    return str(directory.relative_to(root))


def _describe(directory: Path, files: list[Path]) -> dict[str, FileEntry]:
    """Make files durable, and say what they are."""
    entries: dict[str, FileEntry] = {}
    for path in files:
        sync_file(path)
        name = str(path.relative_to(directory))
        entries[name] = FileEntry(sha256=file_sha256(path), bytes=path.stat().st_size)
    for folder in {path.parent for path in files} | {directory, directory.parent, directory.parent.parent}:
        sync_directory(folder)
    return entries


def _problem(directory: Path) -> str | None:
    """What is wrong with a committed checkpoint; None for a whole one."""
    try:
        manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
        for name, entry in manifest.files.items():
            if file_sha256(directory / name) != entry.sha256:
                return f"{name} is not what was written"
        state = msgspec.msgpack.decode((directory / STATE).read_bytes(), type=State)
    except (OSError, msgspec.DecodeError) as cause:
        return str(cause)
    return None if state.format <= FORMAT else f"its format {state.format} is of a newer release"


def _committed(root: Path) -> list[Path]:
    """Directories with a manifest, newest first."""
    epochs = [path for _, path in sorted(_numbered(root, _EPOCH), reverse=True)]
    return [path for epoch in epochs for path in _steps(epoch) if (path / MANIFEST).exists()]


def _steps(epoch: Path) -> list[Path]:
    """An epoch's checkpoints, newest first, committed or not."""
    found = [(_STEP.fullmatch(path.name), path) for path in epoch.iterdir()]
    numbered = [((int(match[1]), int(match[2] or 0)), path) for match, path in found if match]
    return [path for _, path in sorted(numbered, reverse=True)]


def _numbered(root: Path, pattern: re.Pattern[str]) -> Iterator[tuple[int, Path]]:
    for path in root.iterdir() if root.exists() else ():
        if match := pattern.fullmatch(path.name):
            yield int(match[1]), path


def _prune(epoch: Path, keep: int) -> None:
    for directory in [path for path in _steps(epoch) if (path / MANIFEST).exists()][keep:]:
        (directory / MANIFEST).unlink()  # from here on it does not count, however far the rest gets
        shutil.rmtree(directory)
