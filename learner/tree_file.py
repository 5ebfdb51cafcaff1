"""Nested dictionaries and lists of tensors in one safetensors file: DeepSpeed's checkpoints without pickle.

The tensors lie in the file as tensors; the tree around them is msgpack in one more tensor of bytes, with a reference
in place of each tensor. Only plain values are written, so reading a file can never run code.
"""

from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streaming.errors import WeightsError

_TREE = "__tree__"
_PLAIN = (str, int, float, bool, type(None))


def write_tree(path: Path, tree: Any) -> None:
    """Write dictionaries, lists, tuples, sets, plain values, dtypes, shapes and tensors.

    Tensors of one storage and place (tied weights) are written once. Raises TypeError for any other value.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def place(tensor: Tensor) -> str:
        key = (
            (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (id(tensor),)
        )
        if key not in names:
            names[key] = str(len(names))
            tensors[names[key]] = _own(tensor)
        return names[key]

    content = msgspec.msgpack.encode(_flatten(tree, place))
    tensors[_TREE] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    save_file(tensors, path)


def read_tree(path: Path) -> Any:
    """What `write_tree` wrote, with its tensors on the CPU.

    Raises WeightsError where the file is not such a tree.
    """
    try:
        with safe_open(path, framework="pt") as file:
            content = file.get_tensor(_TREE).numpy().tobytes()
            tensors = {name: file.get_tensor(name) for name in file.keys() if name != _TREE}  # noqa: SIM118
        return _restore(msgspec.msgpack.decode(content, strict=False), tensors)
    except (OSError, SafetensorError, msgspec.DecodeError, KeyError) as cause:
        raise WeightsError(f"is not a tree of tensors: {cause}", where=str(path), do="Delete it.") from cause


def _own(tensor: Tensor) -> Tensor:
    """On the CPU and alone in its storage, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    is_alone = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_alone else tensor.clone()


def _flatten(value: Any, place: Any) -> Any:
    """A value of msgpack's types: [tag, content] for whatever is not plain."""
    if isinstance(value, Tensor):
        return ["tensor", place(value)]
    if isinstance(value, Enum):
        return _flatten(value.value, place)
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, torch.Size):
        return ["size", list(value)]
    if isinstance(value, dict):
        return ["dict", [[_flatten(key, place), _flatten(item, place)] for key, item in value.items()]]
    if isinstance(value, tuple) and type(value) is not tuple:
        raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return [kind.__name__, [_flatten(item, place) for item in value]]
    if type(value) in _PLAIN:
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, list):
        return value
    tag, content = value
    match tag:
        case "tensor":
            return tensors[content]
        case "dtype":
            return getattr(torch, content)
        case "size":
            return torch.Size(content)
        case "dict":
            return {_restore(key, tensors): _restore(item, tensors) for key, item in content}
    items = [_restore(item, tensors) for item in content]
    return {"list": list, "tuple": tuple, "set": set}[tag](items)
