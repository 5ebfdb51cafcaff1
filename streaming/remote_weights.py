"""Weight versions below any fsspec URL: how they get there, and how they get onto another machine's disk.

    directory (whole, with manifest) -> uploaded, the manifest last -> downloaded beside its place -> verified -> there

A version is URL/EPOCH.NUMBER/ with the files that its manifest names. `weights.py` says what a whole version is.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from streaming.errors import NotReadyError, WeightsError
from streaming.kept import parse_version
from streaming.records import Version
from streaming.remote import RemoteFolder
from streaming.weights import MANIFEST, Manifest, file_sha256, read_manifest

_UPLOAD_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Before each further try: training goes on meanwhile, up to the next version. A minute bridges most outages."""

_DOWNLOAD_PAUSES_S = (0.5, 1.0)
"""Before each further try of one request; whoever needs the version asks again."""

_TORN_TRIES = 3
"""Downloads of a file whose content is not what the manifest says, before the version counts as damaged."""


class RemoteWeights:
    """The versions of one policy, below a URL."""

    def __init__(
        self,
        url: str,
        *,
        count: Callable[[str], None] = lambda action: None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        """`count` hears of downloads that were tried again: retried (no answer) and torn (not what was announced)."""
        self.url = url.rstrip("/")
        self._count = count
        self._up = RemoteFolder(
            self.url, setting="learner.publish.url", error=NotReadyError, pauses_s=_UPLOAD_PAUSES_S, wait=wait
        )
        self._down = RemoteFolder(
            self.url, setting="learner.publish.url", error=NotReadyError, pauses_s=_DOWNLOAD_PAUSES_S, wait=wait,
            count=count,
        )  # fmt: skip

    def location(self, version: Version) -> str:
        """The URL of a version."""
        return f"{self.url}/{version}"

    def upload(self, directory: Path, version: Version, manifest_sha256: str) -> str:
        """Bring a whole version there, its manifest last, and return its URL.

        Raises NotReadyError where the store does not take it; then there is no manifest, or an older one.
        """
        manifest = read_manifest(directory, manifest_sha256)
        for name in (*manifest.files, MANIFEST):
            self._put(directory / name, f"{version}/{name}")
        return self.location(version)

    def download(self, version: Version, manifest_sha256: str | None, directory: Path) -> None:
        """Make `directory` this version: every file as its manifest says. Nothing is there before all of it is.

        Raises WeightsError where the version is gone or damaged, NotReadyError where the store does not answer.
        Without a sha256 the manifest that lies there is believed, and everything else held to it.
        """
        partial = directory.with_name(f".{directory.name}.{os.getpid()}-{threading.get_ident()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self._download(version, manifest_sha256, partial)
            if not directory.exists():
                partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def versions(self) -> list[Version]:
        """What lies there, whole or not."""
        try:
            found = self._up.attempt("list", "", lambda: self._up.fs.ls(self._up.root, detail=False))
        except FileNotFoundError:
            return []
        versions = [parse_version(str(name).rstrip("/").rsplit("/", 1)[-1]) for name in found]
        return [version for version in versions if version is not None]

    def remove(self, version: Version) -> None:
        """Remove a version: the manifest first, so that what is half removed is no version any more."""
        try:
            self._up.attempt("remove", str(version), lambda: self._remove(str(version)))
        except FileNotFoundError:  # an heir was quicker
            return

    def _remove(self, name: str) -> None:
        manifest = self._up.path(f"{name}/{MANIFEST}")
        if self._up.fs.exists(manifest):
            self._up.fs.rm_file(manifest)
        self._up.fs.rm(self._up.path(name), recursive=True)

    def _put(self, path: Path, name: str) -> None:
        self._up.write(name, lambda: self._up.fs.put_file(str(path), self._up.path(name)))

    def _download(self, version: Version, manifest_sha256: str | None, partial: Path) -> None:
        manifest = self._download_manifest(version, manifest_sha256, partial)
        for name, entry in manifest.files.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(_TORN_TRIES):
                self._get(f"{version}/{name}", target)
                if target.stat().st_size == entry.bytes and file_sha256(target) == entry.sha256:
                    break
                self._count("torn")
            else:
                raise self._damaged(version, f"{name} is not what its manifest says")

    def _download_manifest(self, version: Version, manifest_sha256: str | None, partial: Path) -> Manifest:
        for _ in range(_TORN_TRIES):
            self._get(f"{version}/{MANIFEST}", partial / MANIFEST)
            found = file_sha256(partial / MANIFEST)
            if manifest_sha256 in (None, found):
                return read_manifest(partial, found)
            self._count("torn")
        raise self._damaged(version, f"its manifest has sha256 {found}, announced was {manifest_sha256}")

    def _get(self, name: str, target: Path) -> None:
        try:
            self._down.attempt("read", name, lambda: self._down.fs.get_file(self._down.path(name), str(target)))
        except FileNotFoundError as cause:
            raise WeightsError(
                "it is not there", where=f"{self.url}/{name}", do="A newer version replaces it; it may be pruned."
            ) from cause

    def _damaged(self, version: Version, what: str) -> WeightsError:
        return WeightsError(
            what, where=self.location(version), do="The version is not applied; the next one replaces it."
        )


def is_remote(location: str) -> bool:
    """Whether an announced location is a URL, and not a directory that everybody sees."""
    return "://" in location
