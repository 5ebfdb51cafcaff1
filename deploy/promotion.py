"""The best and the last version of a run, each a complete model directory that stays: RUN/best and RUN/last."""

import os
import shutil
from pathlib import Path

import msgspec

from streaming.errors import NotReadyError, WeightsError
from streaming.records import Version
from streaming.remote_weights import RemoteWeights
from streaming.weights import MANIFEST, Manifest, sync_directory


def version_directory(run: Path, policy: str, version: Version) -> Path:
    """Where the learner publishes a version."""
    return run / "weights" / policy / str(version)


def holds(target: Path, version: Version) -> bool:
    """Whether `target` is a copy of this version already."""
    try:
        return msgspec.json.decode((target / MANIFEST).read_bytes(), type=Manifest).version == version
    except (FileNotFoundError, msgspec.DecodeError):
        return False


def promote(version: Path, target: Path) -> bool:
    """Make `target` a copy of a published version; its files share their content with it where the disk can.

    `target` is whole at any moment but the one between two renames, and a crash there is mended by the next call.
    False, and nothing changes, where the version is no longer on disk.
    """
    partial, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(version, partial, copy_function=_link)
    except (FileNotFoundError, shutil.Error):
        shutil.rmtree(partial, ignore_errors=True)
        return False
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return True


def fetch_and_promote(remote: RemoteWeights, version: Version, target: Path) -> bool:
    """Make `target` a copy of a version that lies behind a URL only. False where it is there no longer."""
    fetched = target.with_name(f".{target.name}.fetched")
    shutil.rmtree(fetched, ignore_errors=True)
    try:
        remote.download(version, None, fetched)
    except (WeightsError, NotReadyError):
        return False
    is_there = promote(fetched, target)
    shutil.rmtree(fetched)
    return is_there


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or a file system without hard links
        shutil.copy2(source, target)
