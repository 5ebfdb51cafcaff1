from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from streaming.errors import ConfigError, NotReadyError, WeightsError
from streaming.records import Version, stable_id
from streaming.remote_weights import RemoteWeights
from streaming.weights import MANIFEST, verify, write_manifest
from tests.s3_server import S3Server

V1, V2 = Version(1, 1), Version(1, 2)


def make_version(folder: Path, version: Version, *, weights: bytes = b"weights" * 1000) -> tuple[Path, str]:
    """A version on disk with a file in a folder of its own, and its manifest's sha256."""
    directory = folder / str(version)
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.bin").write_bytes(weights)
    (directory / "tokenizer" / "vocabulary.txt").write_text("a b c")
    return directory, write_manifest(directory, version)


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that is not there yet, of every kind."""
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        return s3.make_bucket(f"weights-{stable_id(str(tmp_path))}") + "/run/policy"
    MemoryFileSystem.store.clear()
    return f"{request.param}://{tmp_path}/remote/policy"


@pytest.fixture
def counted() -> list[str]:
    return []


@pytest.fixture
def remote(url: str, counted: list[str]) -> RemoteWeights:
    return RemoteWeights(url, count=counted.append, wait=lambda seconds: None)


def upload(remote: RemoteWeights, folder: Path, version: Version = V1) -> str:
    directory, sha256 = make_version(folder, version)
    assert remote.upload(directory, version, sha256) == f"{remote.url}/{version}"
    return sha256


def test_a_version_comes_down_as_it_went_up(remote: RemoteWeights, tmp_path: Path) -> None:
    sha256 = upload(remote, tmp_path / "here")
    remote.download(V1, sha256, tmp_path / "there" / "1.1")
    assert verify(tmp_path / "there" / "1.1", sha256).version == V1
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["1.1"]


def test_what_lies_there_is_listed_and_removed(remote: RemoteWeights, tmp_path: Path) -> None:
    assert remote.versions() == []
    sha256 = upload(remote, tmp_path, V1)
    upload(remote, tmp_path, V2)
    assert sorted(remote.versions()) == [V1, V2]
    remote.remove(V1)
    assert remote.versions() == [V2]
    remote.remove(V1)
    with pytest.raises(WeightsError, match="not there"):
        remote.download(V1, sha256, tmp_path / "there")


def test_a_version_that_was_half_uploaded_is_none(remote: RemoteWeights, tmp_path: Path) -> None:
    directory, sha256 = make_version(tmp_path / "here", V1)
    (directory / "model.bin").unlink()
    with pytest.raises(NotReadyError):
        remote.upload(directory, V1, sha256)
    with pytest.raises(WeightsError, match=r"manifest\.json: it is not there"):
        remote.download(V1, sha256, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_version_that_was_uploaded_again_after_a_crash_is_the_new_one(remote: RemoteWeights, tmp_path: Path) -> None:
    upload(remote, tmp_path / "before")
    directory, sha256 = make_version(tmp_path / "after", V1, weights=b"other")
    remote.upload(directory, V1, sha256)
    remote.download(V1, sha256, tmp_path / "there")
    assert (tmp_path / "there" / "model.bin").read_bytes() == b"other"


@pytest.fixture
def shared(tmp_path: Path, counted: list[str]) -> RemoteWeights:
    """A remote folder whose files a test can damage."""
    return RemoteWeights(f"file://{tmp_path}/shared", count=counted.append, wait=lambda seconds: None)


@pytest.mark.parametrize("name", ["model.bin", "tokenizer/vocabulary.txt", MANIFEST])
@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"X" + content[1:]])
def test_damaged_files_are_downloaded_again_and_then_refused(
    shared: RemoteWeights, tmp_path: Path, counted: list[str], name: str, damage: Callable[[bytes], bytes]
) -> None:
    sha256 = upload(shared, tmp_path / "here")
    file = tmp_path / "shared" / str(V1) / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(WeightsError, match=r"is not what its manifest says|its manifest has sha256"):
        shared.download(V1, sha256, tmp_path / "there")
    assert counted == ["torn"] * 3
    assert not list(tmp_path.glob("*there*"))


def test_a_file_that_is_missing_is_refused(shared: RemoteWeights, tmp_path: Path) -> None:
    sha256 = upload(shared, tmp_path / "here")
    (tmp_path / "shared" / str(V1) / "model.bin").unlink()
    with pytest.raises(WeightsError, match="not there"):
        shared.download(V1, sha256, tmp_path / "there")


def test_a_manifest_never_leads_out_of_the_directory(shared: RemoteWeights, tmp_path: Path) -> None:
    upload(shared, tmp_path / "here")
    manifest = tmp_path / "shared" / str(V1) / MANIFEST
    manifest.write_text(manifest.read_text().replace("config.json", "../config.json"))
    with pytest.raises(WeightsError, match="outside"):
        shared.download(V1, None, tmp_path / "there")


def test_without_an_announcement_the_manifest_itself_is_held_to(shared: RemoteWeights, tmp_path: Path) -> None:
    upload(shared, tmp_path / "here")
    shared.download(V1, None, tmp_path / "there")
    (tmp_path / "shared" / str(V1) / "model.bin").write_bytes(b"torn")
    with pytest.raises(WeightsError, match="not what its manifest says"):
        shared.download(V1, None, tmp_path / "again")


def test_a_store_that_is_away_is_tried_again_and_is_no_reason_to_refuse(
    s3: S3Server, tmp_path: Path, counted: list[str]
) -> None:
    remote = RemoteWeights(s3.make_bucket("weights-away"), count=counted.append, wait=lambda seconds: None)
    sha256 = upload(remote, tmp_path / "here")
    s3.close()
    try:
        with pytest.raises(NotReadyError, match="cannot read it"):
            remote.download(V1, sha256, tmp_path / "there")
        assert counted == ["retried"] * 2
        with pytest.raises(NotReadyError, match="cannot write it"):
            remote.upload(tmp_path / "here" / str(V1), V1, sha256)
    finally:
        s3.start()


def test_a_url_of_no_known_kind_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"learner\.publish\.url"):
        RemoteWeights("nosuch://somewhere")
