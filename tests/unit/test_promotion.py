from pathlib import Path

from deploy.promotion import fetch_and_promote, holds, promote, version_directory
from streaming.records import Version
from streaming.remote_weights import RemoteWeights
from streaming.weights import write_manifest


def published(run: Path, number: int) -> Path:
    directory = version_directory(run, "policy", Version(1, number))
    (directory / "sub").mkdir(parents=True)
    (directory / "model.safetensors").write_text(f"weights {number}")
    (directory / "sub" / "more.json").write_text("{}")
    return directory


def test_what_is_kept_already_is_recognised(tmp_path):
    assert not holds(tmp_path / "best", Version(1, 3))
    source = published(tmp_path, 3)
    (source / "model.safetensors").unlink()
    write_manifest(source, Version(1, 3))
    promote(source, tmp_path / "best")
    assert holds(tmp_path / "best", Version(1, 3))
    assert not holds(tmp_path / "best", Version(1, 4))


def test_a_kept_version_survives_the_removal_of_the_published_one(tmp_path):
    source = published(tmp_path, 3)
    assert promote(source, tmp_path / "best")
    (source / "model.safetensors").unlink()
    assert (tmp_path / "best" / "model.safetensors").read_text() == "weights 3"
    assert (tmp_path / "best" / "sub" / "more.json").exists()


def test_a_newer_best_replaces_the_older_one_whole(tmp_path):
    promote(published(tmp_path, 3), tmp_path / "best")
    newer = published(tmp_path, 4)
    (newer / "sub" / "more.json").unlink()
    assert promote(newer, tmp_path / "best")
    assert (tmp_path / "best" / "model.safetensors").read_text() == "weights 4"
    assert not (tmp_path / "best" / "sub" / "more.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "weights"]


def test_a_version_that_is_gone_leaves_the_kept_one_as_it_is(tmp_path):
    promote(published(tmp_path, 3), tmp_path / "best")
    assert not promote(tmp_path / "weights" / "policy" / "1.99", tmp_path / "best")
    assert (tmp_path / "best" / "model.safetensors").read_text() == "weights 3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "weights"]


def test_a_crash_between_the_two_renames_is_mended_by_the_next_call(tmp_path):
    promote(published(tmp_path, 3), tmp_path / "best")
    (tmp_path / "best").rename(tmp_path / ".best.old")
    (tmp_path / ".best.partial").mkdir()
    assert not promote(tmp_path / "weights" / "policy" / "1.99", tmp_path / "best")
    assert (tmp_path / "best" / "model.safetensors").read_text() == "weights 3"
    assert promote(published(tmp_path, 5), tmp_path / "best")
    assert (tmp_path / "best" / "model.safetensors").read_text() == "weights 5"


def test_a_version_that_lies_behind_a_url_only_is_fetched_and_kept(tmp_path):
    source = tmp_path / "learner"
    source.mkdir()
    (source / "model.bin").write_text("weights 3")
    remote = RemoteWeights(f"file://{tmp_path}/remote")
    remote.upload(source, Version(1, 3), write_manifest(source, Version(1, 3)))
    assert fetch_and_promote(remote, Version(1, 3), tmp_path / "best")
    assert (tmp_path / "best" / "model.bin").read_text() == "weights 3"
    assert not fetch_and_promote(remote, Version(1, 4), tmp_path / "best")
    assert (tmp_path / "best" / "model.bin").read_text() == "weights 3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "learner", "remote"]
