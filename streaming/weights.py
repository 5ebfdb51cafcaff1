"""A published weight version on disk: its manifest, and the check that nothing of it is torn or changed.

A version is a complete Hugging Face model directory. `manifest.json` is written last, so its presence means that
the rest is durable; its own sha256 travels in the WeightVersion record, so a reader knows that it holds the very
bytes that the learner announced. This file knows nothing of torch: it reads safetensors headers as JSON.
"""

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec

from streaming.errors import WeightsError
from streaming.records import Version

MANIFEST = "manifest.json"
TENSOR_SUFFIX = ".safetensors"

PARTIAL = ".partial"
"""End of the name of a file that is being written."""

_MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit of a header."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the directory."""

    sha256: str
    bytes: int


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor, as its safetensors header names it: dtype "F32", "BF16", ..."""

    dtype: str
    shape: list[int]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a version consists of."""

    version: Version
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


def write_manifest(directory: Path, version: Version) -> str:
    """Make every file of `directory` durable, then write its manifest; returns the manifest's sha256.

    The manifest appears whole or not at all. Whoever announces the version does so after this returns.
    """
    names = sorted(str(path.relative_to(directory)) for path in _files(directory))
    files = {name: _sync_and_describe(directory / name) for name in names}
    tensors: dict[str, TensorEntry] = {}
    for name in names:
        if name.endswith(TENSOR_SUFFIX):
            tensors |= read_header(directory / name)
    for folder in {(directory / name).parent for name in names}:
        sync_directory(folder)
    content = msgspec.json.format(
        msgspec.json.encode(Manifest(version=version, files=files, tensors=tensors)), indent=1
    )
    write_durably(directory / MANIFEST, content)
    return hashlib.sha256(content).hexdigest()


def verify(directory: Path, manifest_sha256: str) -> Manifest:
    """The manifest of a version whose every file is exactly what the learner wrote.

    Raises WeightsError where anything is missing, torn or different; files that the manifest does not name are
    an error too, because a model loader would read them.
    """
    manifest = read_manifest(directory, manifest_sha256)
    extra = {str(path.relative_to(directory)) for path in _files(directory)} - set(manifest.files)
    if extra:
        raise _broken(directory, f"holds files that its manifest does not name: {', '.join(sorted(extra))}")
    for name, entry in manifest.files.items():
        _verify_file(directory, name, entry)
    return manifest


def read_manifest(directory: Path, manifest_sha256: str) -> Manifest:
    """The manifest alone, checked against the announced sha256; the files are not read."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as cause:
        raise _broken(path, f"cannot be read: {cause.strerror}") from cause
    found = hashlib.sha256(content).hexdigest()
    if found != manifest_sha256:
        raise _broken(path, f"has sha256 {found}, announced was {manifest_sha256}")
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as cause:
        raise _broken(path, f"is not a manifest: {cause}") from cause
    outside = [name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise _broken(path, f"names files outside its directory: {', '.join(outside)}")
    return manifest


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Name, dtype and shape of every tensor in a safetensors file. Raises WeightsError where it is not one."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise _broken(path, f"is not a safetensors file: its header would be {length} bytes long")
            header = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        return {name: msgspec.json.decode(raw, type=TensorEntry) for name, raw in header.items()}
    except OSError as cause:
        raise _broken(path, f"cannot be read: {cause.strerror}") from cause
    except msgspec.DecodeError as cause:
        raise _broken(path, f"is not a safetensors file: {cause}") from cause


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that, after any crash, holds either all of `content` or what it held before.

    Several may write it at once. Where this raises, nothing is left of the try; a crash may leave a PARTIAL file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power loss."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power loss."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)


def _sync_and_describe(path: Path) -> FileEntry:
    sync_file(path)
    return FileEntry(sha256=file_sha256(path), bytes=path.stat().st_size)


def _verify_file(directory: Path, name: str, entry: FileEntry) -> None:
    path = directory / name
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise _broken(path, f"has {size} bytes, the manifest says {entry.bytes}")
        found = file_sha256(path)
    except OSError as cause:
        raise _broken(path, f"cannot be read: {cause.strerror}") from cause
    if found != entry.sha256:
        raise _broken(path, f"has sha256 {found}, the manifest says {entry.sha256}")


def _broken(path: Path, what: str) -> WeightsError:
    return WeightsError(what, where=str(path), do="The version is not applied; the next one replaces it.")
