import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from streaming.errors import WeightsError
from streaming.records import Version
from streaming.weights import MANIFEST, verify, write_durably, write_manifest


@pytest.fixture
def directory(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_a_version_that_nobody_touched_is_verified(directory):
    manifest = verify(directory, write_manifest(directory, Version(2, 7)))
    assert manifest.version == Version(2, 7)
    assert set(manifest.files) == {"model.safetensors", "config.json"}


def test_the_manifest_names_every_tensor_with_its_type_and_shape(directory):
    tensors = verify(directory, write_manifest(directory, Version(1, 0))).tensors
    assert {name: (one.dtype, one.shape) for name, one in tensors.items()} == {"a": ("F32", [2, 3]), "b": ("BF16", [4])}


def cut_a_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
@pytest.mark.parametrize("damage", [cut_a_byte, flip_a_bit, lambda path: path.unlink()])
def test_any_damage_to_any_file_is_found(directory, name, damage):
    sha256 = write_manifest(directory, Version(1, 0))
    damage(directory / name)
    with pytest.raises(WeightsError, match=name):
        verify(directory, sha256)


def test_a_manifest_of_another_version_is_refused(directory):
    announced = write_manifest(directory, Version(1, 0))
    write_manifest(directory, Version(1, 1))
    with pytest.raises(WeightsError, match="announced was"):
        verify(directory, announced)


def test_a_file_that_the_manifest_does_not_name_is_refused(directory):
    sha256 = write_manifest(directory, Version(1, 0))
    (directory / "more.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="more"):
        verify(directory, sha256)


def test_a_manifest_cannot_name_a_file_outside_its_directory(directory):
    write_manifest(directory, Version(1, 0))
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"]["../x"] = manifest["files"]["config.json"]
    (directory / MANIFEST).write_text(json.dumps(manifest))

    sha256 = hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match="outside"):
        verify(directory, sha256)


def test_a_file_that_is_not_safetensors_makes_no_manifest(directory):
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(WeightsError, match="not a safetensors file"):
        write_manifest(directory, Version(1, 0))
    assert not (directory / MANIFEST).exists()


def test_a_durable_write_leaves_nothing_but_the_file(tmp_path):
    write_durably(tmp_path / "x", b"old")
    write_durably(tmp_path / "x", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"new")]


def test_a_durable_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "in the way").mkdir()
    with pytest.raises(OSError):
        write_durably(tmp_path / "in the way", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["in the way"]
