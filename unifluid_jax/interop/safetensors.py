"""Safetensors files, alone or several with an index, read and written by parts.

The safetensors library maps or holds whole files; here a tensor can be bigger than the memory. The
format: 8 bytes little-endian length of the header; the header, JSON: name -> {dtype, shape,
data_offsets into the rest}; then the rest.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from unifluid_jax.errors import UserError
from unifluid_jax.interop.rules import Leaf, Span
from unifluid_jax.interop.tensors import BFLOAT16, Place, RawTensors, portions

_DTYPES = {
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "BOOL": np.dtype(np.bool_),
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# The library's own limit.
_LONGEST_HEADER = 100_000_000

# Files are cut where transformers cuts them.
_FILE_BYTES = 5_000_000_000


def open_file(path: Path) -> RawTensors:
    """The tensors of one file.

    Raises:
        UserError: the file is no safetensors file, or it is cut short: names the first tensor lost.
    """
    leaves, places = _directory(path)
    return RawTensors(path, leaves, places)


def open_index(path: Path) -> RawTensors:
    """The tensors of the files that an index names.

    Raises:
        UserError: the index cannot be read, a file of it is missing, or lacks a tensor.
    """
    files = {file: _directory(path.parent / file) for file in weight_files(path)}
    leaves, places = {}, {}
    for name, file in _weight_map(path).items():
        if name not in files[file][0]:
            raise UserError(f"{path.parent / file} lacks {name}, which {path.name} says it holds")
        leaves[name], places[name] = files[file][0][name], files[file][1][name]
    return RawTensors(path.parent, leaves, places)


def weight_files(index: Path) -> list[str]:
    """The files of an index, all of them there.

    Raises:
        UserError: the index cannot be read, or a file is missing: names its first tensor.
    """
    files = {}
    for name, file in _weight_map(index).items():
        files.setdefault(file, name)
    for file, name in files.items():
        if not (index.parent / file).is_file():
            raise UserError(f"{index.parent / file} is missing: {index.name} says it holds {name}")
    return list(files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in names.values()):
            raise ValueError("file names expected")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weights ({error}): fetch it anew") from None
    return names


def _directory(path: Path) -> tuple[dict[str, Leaf], dict[str, Place]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise UserError(f"{path} is no safetensors file, or its header is cut short")
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        begin = 8 + length
        leaves, places = {}, {}
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            shape, dtype = tuple(map(int, entry["shape"])), _DTYPES[entry["dtype"]]
            if min((0, *shape)) < 0 or not 0 <= start <= stop:
                raise ValueError(f"{name} has a negative size")
            if math.prod(shape) * dtype.itemsize != stop - start:
                raise ValueError(f"{name} has {stop - start} bytes for {list(shape)}")
            leaves[name] = Leaf(shape, dtype)
            places[name] = Place(path, begin + start)
    except KeyError as error:
        raise UserError(f"the header of {path} knows no {error}: the file is damaged") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the header of {path} is damaged ({error}): fetch it anew") from None
    for name in sorted(places, key=lambda name: places[name].offset):
        end = places[name].offset + leaves[name].nbytes
        if end > size:
            raise UserError(
                f"{path} is cut short: {name} ends at byte {end:,} of a file of {size:,}; "
                "fetch it anew"
            )
    return leaves, places


class Writer:
    """A folder of safetensors files that are filled by parts.

    Args:
        folder: exists.
        leaves: what is to be written; files keep this order.
        stem: of the files: "model" makes model.safetensors, or model-00001-of-00002.safetensors
            and so on with model.safetensors.index.json.
    """

    def __init__(
        self,
        folder: Path,
        leaves: Mapping[str, Leaf],
        stem: str = "model",
        file_bytes: int = _FILE_BYTES,
    ):
        self.leaves = dict(leaves)
        self._left = {name: leaf.nbytes for name, leaf in leaves.items()}
        self._place: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        shards = portions(leaves, file_bytes)
        names = [f"{stem}.safetensors"]
        if len(shards) > 1:
            n = len(shards)
            names = [f"{stem}-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
            index = {
                "metadata": {"total_size": sum(leaf.nbytes for leaf in leaves.values())},
                "weight_map": {
                    name: file for file, shard in zip(names, shards, strict=True) for name in shard
                },
            }
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / f"{stem}.safetensors.index.json").write_text(text)
        for file, shard in zip(names, shards, strict=True):
            self._begin(folder / file, {name: leaves[name] for name in shard})

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *unused: object) -> None:
        for file in self._files:
            os.close(file)
        # A bug of a table: zeros in a file that looks finished would be the worst of all.
        holes = [name for name, left in self._left.items() if left]
        if kind is None and holes:
            raise ValueError(f"{len(holes)} tensors were not written in full, like {holes[0]}")

    def write(self, span: Span, x: np.ndarray) -> None:
        """Writes a span; every byte is to be written once."""
        leaf = self.leaves[span.name]
        if x.dtype != leaf.dtype:
            raise ValueError(f"{span.name} is {leaf}, got {x.dtype}")
        first = 0
        for axis, index in enumerate(span.at):
            first += index * math.prod(leaf.shape[axis + 1 :])
        if span.rows is not None:
            first += span.rows[0] * math.prod(leaf.shape[len(span.at) + 1 :])
        file, offset = self._place[span.name]
        data = memoryview(np.ascontiguousarray(x).reshape(-1).view(np.uint8))
        at = offset + first * leaf.dtype.itemsize
        self._left[span.name] -= len(data)
        while data:
            done = os.pwrite(file, data, at)
            data, at = data[done:], at + done

    def _begin(self, path: Path, leaves: Mapping[str, Leaf]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, leaf in leaves.items():
            header[name] = {
                "dtype": _NAMES[leaf.dtype],
                "shape": list(leaf.shape),
                "data_offsets": [end, end + leaf.nbytes],
            }
            end += leaf.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._files.append(file)
        os.write(file, struct.pack("<Q", len(text)) + text)
        os.truncate(file, 8 + len(text) + end)
        for name in leaves:
            self._place[name] = (file, 8 + len(text) + header[name]["data_offsets"][0])
