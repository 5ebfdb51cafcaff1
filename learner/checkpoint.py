"""Checkpoints: the model, the optimizer and the place in the log, committed as one.

    engine files and RNG of every rank (durable) -> state (durable) -> manifest with all hashes (the commit)

    ROOT/epoch-E/beginning.json
    ROOT/epoch-E/step-N/    engine/...  rank-R.msgpack  state.msgpack  manifest.json

A directory without a manifest never counts, so a crash at any moment leaves the checkpoint before it as the newest.
Each start of the learner writes into its own epoch and prunes only there: nothing that an older epoch committed is
lost by a start that goes wrong. `epoch-E/beginning.json` names the checkpoint that epoch E started from: what an older
epoch commits later (a zombie that stood still while epoch E started) is no ancestor, and never restored.
"""

import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import torch

from learner.gap_scale import GapScale
from learner.pairs import ReaderState
from learner.ranks import Ranks
from streaming.errors import ConfigError
from streaming.records import Feedback, Fence, Version
from streaming.weights import FileEntry, file_sha256, sync_directory, sync_file, write_durably

MANIFEST = "manifest.json"
STATE = "state.msgpack"
BEGINNING = "beginning.json"
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
    issued: int = 0  # training requests issued by then, as the scheduler told
    gap_scale: GapScale = GapScale()
    format: int = FORMAT


class Beginning(msgspec.Struct, frozen=True):
    """What an epoch started from."""

    epoch: int
    origin: str | None  # a checkpoint's directory, below the root; None: the initial model
    fences: list[Fence] = []
    is_new_log: bool = False  # the log was lost: offsets and fences of older epochs mean nothing in the present one


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


def claim_epoch(root: Path, *, at_least: int) -> int:
    """Begin an epoch that nobody has begun: newer than every one that has a directory here."""
    root.mkdir(parents=True, exist_ok=True)
    epoch = max(at_least, newest_epoch(root) + 1)
    while True:
        try:
            (root / f"epoch-{epoch}").mkdir()  # exactly one of several that start at once makes it
        except FileExistsError:
            epoch += 1
        else:
            sync_directory(root)
            return epoch


def write_beginning(
    root: Path, epoch: int, origin: Checkpoint | None, fences: list[Fence], *, is_new_log: bool = False
) -> None:
    """Make durable what this epoch starts from. Before that it has started from nothing, and hides nothing."""
    name = None if origin is None else str(origin.directory.relative_to(root))
    content = msgspec.json.encode(Beginning(epoch, name, fences, is_new_log))
    write_durably(root / f"epoch-{epoch}" / BEGINNING, content)


def fences(root: Path) -> list[Fence]:
    """The fences that epochs of the present log wrote down; one is there once for each epoch that knew of it."""
    begun = [_beginning(path) for _, path in _numbered(root, _EPOCH)]
    first = log_began(root)
    return [fence for one in begun if one is not None and one.epoch >= first for fence in one.fences]


def log_began(root: Path) -> int:
    """The epoch with which the present log began, 0 for the first log: offsets of older epochs are of another one."""
    begun = [_beginning(path) for _, path in _numbered(root, _EPOCH)]
    return max((one.epoch for one in begun if one is not None and one.is_new_log), default=0)


def save(
    root: Path,
    state: State | None,
    engine: Savable,
    ranks: Ranks,
    *,
    keep: int,
    still_ours: Callable[[], None] = lambda: None,
) -> Path:
    """Write and commit a checkpoint, then remove the oldest of this epoch beyond `keep`. Every rank calls it.

    Rank 0 alone gives a state. There `still_ours` is asked before the commit and before the removal; what it raises
    stops either.
    """
    directory = root / ranks.share(None if state is None else _make(root, state).encode()).decode()
    files = engine.save(directory)
    own = directory / f"rank-{ranks.rank}.msgpack"
    own.write_bytes(msgspec.msgpack.encode(_random_state()))
    everyone = ranks.gather(msgspec.msgpack.encode(_describe(directory, [*files, own])))
    if state is not None:
        write_durably(directory / STATE, msgspec.msgpack.encode(state))
        described = [msgspec.msgpack.decode(one, type=dict[str, FileEntry]) for one in everyone]
        described.append(_describe(directory, [directory / STATE]))
        manifest = Manifest(state.version.epoch, state.step, {name: one for d in described for name, one in d.items()})
        still_ours()
        write_durably(directory / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        still_ours()  # an heir may stand on one of those that are to go
        _prune(directory.parent, keep)
    ranks.barrier()
    return directory


def newest(root: Path) -> Checkpoint | None:
    """The newest committed checkpoint that is whole, of the newest epoch and its ancestors.

    A damaged one is passed over with a warning: training goes on from the one before it, and what came after is
    trained again.
    """
    for directory in _line_of_descent(root):
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

    Without ZeRO every rank holds everything, so the number of ranks may change. In bfloat16 there is always ZeRO.
    """
    found = checkpoint.state.layout
    is_whole = found.zero_stage == layout.zero_stage == 0 and layout.dtype == "float32"
    same_ranks = found.world_size == layout.world_size or is_whole
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


def _line_of_descent(root: Path) -> Iterator[Path]:
    """Directories with a manifest, newest first, without those that the newest epoch does not descend from."""
    last: tuple[int, tuple[int, int]] | None = None  # epoch and step that a newer one started from
    for epoch, path in sorted(_numbered(root, _EPOCH), reverse=True):
        if last is not None and epoch > last[0]:
            continue
        for directory in _steps(path):
            is_later = last is not None and epoch == last[0] and _step_of(directory) > last[1]
            if not is_later and (directory / MANIFEST).exists():
                yield directory
        begun = _beginning(path)
        if begun is not None and begun.origin is None:
            return
        if begun is not None and begun.origin is not None:
            origin = root / begun.origin
            last = _number_of(origin.parent, _EPOCH), _step_of(origin)


def _beginning(epoch: Path) -> Beginning | None:
    """What an epoch says of its beginning; None where it had not come to say it, or is of an older release."""
    try:
        content = (epoch / BEGINNING).read_bytes()
    except FileNotFoundError:
        return None
    return msgspec.json.decode(content, type=Beginning)


def _steps(epoch: Path) -> list[Path]:
    """An epoch's checkpoints, newest first, committed or not."""
    return sorted((path for path in epoch.iterdir() if _STEP.fullmatch(path.name)), key=_step_of, reverse=True)


def _step_of(directory: Path) -> tuple[int, int]:
    """A checkpoint's step, and how often it had been saved before."""
    match = _STEP.fullmatch(directory.name)
    assert match is not None, f"{directory} is no checkpoint"
    return int(match[1]), int(match[2] or 0)


def _number_of(directory: Path, pattern: re.Pattern[str]) -> int:
    match = pattern.fullmatch(directory.name)
    assert match is not None, f"{directory} has no number"
    return int(match[1])


def _numbered(root: Path, pattern: re.Pattern[str]) -> Iterator[tuple[int, Path]]:
    for path in root.iterdir() if root.exists() else ():
        if match := pattern.fullmatch(path.name):
            yield int(match[1]), path


def _prune(epoch: Path, keep: int) -> None:
    for directory in [path for path in _steps(epoch) if (path / MANIFEST).exists()][keep:]:
        (directory / MANIFEST).unlink()  # from here on it does not count, however far the rest gets
        shutil.rmtree(directory)
