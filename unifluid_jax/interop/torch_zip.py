"""PyTorch's .bin, .ckpt and .pth files (zip archives, PyTorch 1.6 and later), without PyTorch.

Such a file is a pickle, and unpickling may call anything that the pickle names. This one calls
nothing but what is defined here: the names of tensors, storages and containers stand for records
of where the numbers lie; names of a few libraries that trainers leave in their checkpoints become
objects that do nothing; any other name is refused. The numbers themselves are read by parts.
"""

import collections
import dataclasses
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from unifluid_jax.errors import UserError
from unifluid_jax.interop.npz import member_offset
from unifluid_jax.interop.rules import Leaf
from unifluid_jax.interop.tensors import BFLOAT16, Place, RawTensors

_STORAGES = {
    "BFloat16Storage": BFLOAT16,
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
# What trainers leave beside the weights. Their names become objects that do nothing.
_INERT = ("pytorch_lightning.", "lightning.", "omegaconf.", "numpy.", "argparse.", "_codecs.")

# Where checkpoints keep the weights, first match wins: Lightning's, MAR's.
_WEIGHTS = ("state_dict", "model")

_LONGEST_PICKLE = 1 << 28


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Takes whatever a pickle does to an object, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass


class _Containers(collections.OrderedDict):
    """An OrderedDict whose attributes (a module's `_metadata`) are dropped."""

    def __setstate__(self, state: Any) -> None:
        pass


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise pickle.UnpicklingError("a tensor without storage")
    if not all(isinstance(n, int) and 0 <= n < 1 << 48 for n in numbers):
        raise pickle.UnpicklingError("a tensor of impossible sizes")
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and offset + reach > storage.count:
        raise pickle.UnpicklingError("a tensor that is larger than its storage")
    return _Tensor(storage, offset, shape, strides)


def _parameter(data: Any, *rest: Any) -> Any:
    return data


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Containers
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name == "Size":
            return tuple
        if f"{module}.".startswith(_INERT):
            return _Inert
        raise UserError(
            f"names {module}.{name}, which no weights need: a pickle can run any program, and this "
            "one is refused"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("a storage of unknown kind")
        return _Storage(dtype, key, int(count))


def open_file(path: Path) -> RawTensors:
    """The weights of a file: the tensors of its state_dict, or of its one dict of tensors.

    Raises:
        UserError: no such file, damaged, of an older format, or it names what it should not.
    """
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is no file of PyTorch 1.6 or later, or is cut short: fetch it anew, or load "
            "it in PyTorch and save it again"
        ) from None
    with archive:
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1 or members[pickles[0]].file_size > _LONGEST_PICKLE:
            raise UserError(f"{path} is a zip archive, but none that PyTorch wrote")
        root = pickles[0].removesuffix("data.pkl")
        if (order := members.get(root + "byteorder")) and archive.read(order) != b"little":
            raise UserError(f"{path} is stored with the other byte order: save it anew")
        try:
            with archive.open(pickles[0]) as file:
                content = _Unpickler(file, encoding="utf-8").load()
        except UserError as error:
            raise UserError(f"{path} {error}") from None
        except Exception as error:
            # A damaged pickle raises anything; nothing of it was called but this module's.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"{path} is damaged ({reason}): fetch it anew") from None
    leaves, places = {}, {}
    for name, tensor in _weights(content, path).items():
        info = members.get(f"{root}data/{tensor.storage.key}")
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path} lacks the numbers of {name}: fetch it anew")
        if info.file_size != tensor.storage.count * tensor.storage.dtype.itemsize:
            raise UserError(f"{path} is damaged: {name} has {info.file_size:,} bytes of storage")
        dtype = tensor.storage.dtype
        leaves[name] = Leaf(tensor.shape, dtype)
        begin = member_offset(path, info) + tensor.offset * dtype.itemsize
        order = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
        # Along an axis of one element a stride says nothing.
        plain = all(
            n == 1 or s == o for n, s, o in zip(tensor.shape, tensor.strides, order, strict=True)
        )
        places[name] = Place(path, begin, None if plain else tensor.strides)
    return RawTensors(path, leaves, places)


def _weights(content: Any, path: Path) -> dict[str, _Tensor]:
    if isinstance(content, dict):
        content = next(
            (content[key] for key in _WEIGHTS if isinstance(content.get(key), dict)), content
        )
        tensors = {
            name: value
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, _Tensor)
        }
        if tensors:
            return tensors
    raise UserError(f"{path} holds no dict of tensors")
