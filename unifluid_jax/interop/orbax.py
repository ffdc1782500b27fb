"""Orbax folders leaf by leaf: our checkpoints, and those of the `gemma` package.

Orbax restores trees whole. To read or write a layer at a time its arrays are opened where they lie,
with TensorStore, which Orbax is built on. A folder is begun by Orbax itself with tiny arrays in
their place, so that everything but the arrays is of its making.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging

from unifluid_jax import checksums, trees
from unifluid_jax.errors import UserError
from unifluid_jax.interop.rules import PIECE, Leaf, Span, even_step, split

# No cache, one copy at a time: a span costs its own size.
_CONTEXT = tensorstore.Context(
    {"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}}
)


def is_folder(path: Path) -> bool:
    """Whether Orbax wrote arrays here."""
    return (path / "_METADATA").is_file()


class OrbaxSource:
    """The arrays of a folder; names are their keys, joined by "/".

    Args:
        folder: holds `_METADATA`.
        below: the first key of those wanted ("ema"), which the names then lack; all by default.

    Raises:
        UserError: the folder is damaged, or nothing in it is below that key.
    """

    def __init__(self, folder: Path, below: str | None = None):
        self.path = folder
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                tree = reader.metadata(folder.resolve()).item_metadata.tree
            metadata = json.loads((folder / "_METADATA").read_text())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder} is no whole Orbax checkpoint ({reason})") from error
        self._ocdbt = metadata.get("use_ocdbt", True)
        self._zarr3 = metadata.get("use_zarr3", False)
        self.leaves: dict[str, Leaf] = {}
        self._stored: dict[str, str] = {}
        prefix = "" if below is None else f"{below}/"
        for keys, array in _walk(tree):
            name = "/".join(keys)
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                self.leaves[name] = Leaf(tuple(array.shape), np.dtype(array.dtype))
                self._stored[name] = ".".join(keys)
        if not self.leaves:
            raise UserError(f'{folder} has nothing below "{below}"')
        self._open: tuple[str, Any] = ("", None)

    def check(self, leaves: Mapping[str, Sequence[Any]]) -> None:
        """Reads everything once, a span at a time, and compares it with what was saved.

        Args:
            leaves: [kind, checksum] by name.

        Raises:
            UserError: something differs.
        """
        for name, (kind, wanted) in leaves.items():
            leaf = self.leaves.get(name)
            found = 0
            if leaf is not None and checksums.kind(leaf) == kind:
                stacked = len(leaf.shape) > 2 and leaf.nbytes > PIECE
                for at, rows in split(leaf, stacked):
                    span = Span(name, at, rows)
                    found += checksums.part(self.read(span), _start(leaf, span))
            if leaf is None or found % 2**32 != wanted:
                raise UserError(f"{self.path} is damaged at {name} (checksums differ)")

    def where(self, name: str) -> str:
        return str(self.path)

    def read(self, span: Span) -> np.ndarray:
        if self._open[0] != span.name:
            self._open = (span.name, self._array(span.name))
        array = self._open[1][span.at]
        if span.rows is not None:
            array = array[slice(*span.rows)]
        try:
            return np.asarray(array.read().result())
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.path} is damaged at {span.name} ({reason})") from error

    def _array(self, name: str) -> Any:
        stored = self._stored[name]
        if self._ocdbt:
            base = f"file://{self.path.resolve()}/"
            store = {"driver": "ocdbt", "base": base, "path": f"{stored}/"}
        else:
            store = {"driver": "file", "path": f"{self.path.resolve() / stored}/"}
        spec = {"driver": "zarr3" if self._zarr3 else "zarr", "kvstore": store}
        try:
            return tensorstore.open(spec, context=_CONTEXT, read=True).result()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.path} is damaged at {name} ({reason})") from error


def _start(leaf: Leaf, span: Span) -> int:
    """Index of a span's first number in the whole tensor."""
    first = 0
    for axis, index in enumerate((*span.at, *(span.rows or ())[:1])):
        first += index * math.prod(leaf.shape[axis + 1 :])
    return first


def _walk(tree: Any, keys: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Key paths and array metadata; keys may hold "/" themselves."""
    if isinstance(tree, Mapping):
        return [found for key in tree for found in _walk(tree[key], (*keys, str(key)))]
    return [] if not hasattr(tree, "dtype") else [(keys, tree)]


class OrbaxSink:
    """A folder that is filled by parts; Orbax and all that uses it can read it.

    Args:
        folder: does not exist.
        leaves: what is to be written, by path.

    Attributes:
        sums: checksums of what was written, by path.
    """

    def __init__(self, folder: Path, leaves: Mapping[str, Leaf]):
        self.leaves = dict(leaves)
        self.sums = dict.fromkeys(leaves, 0)
        self._left = {name: leaf.nbytes for name, leaf in leaves.items()}
        self._folder = folder
        self._open: tuple[str, Any] = ("", None)
        skeleton: dict[str, Any] = {}
        for name, leaf in leaves.items():
            *groups, last = name.split("/")
            node = skeleton
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = np.zeros((1,) * len(leaf.shape), leaf.dtype)
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        with _quiet(), ocp.Checkpointer(handler) as writer:
            writer.save(folder.resolve(), args=ocp.args.PyTreeSave(skeleton))
        for name in trees.flatten(skeleton):
            self._array(name, create=True)

    def __enter__(self) -> "OrbaxSink":
        return self

    def __exit__(self, kind: type | None, *unused: object) -> None:
        self._open = ("", None)
        # A bug of a table: holes are read as zeros.
        holes = [name for name, left in self._left.items() if left]
        if kind is None and holes:
            raise ValueError(f"{len(holes)} arrays were not written in full, like {holes[0]}")

    def write(self, span: Span, x: np.ndarray) -> None:
        """Writes a span; every number is to be written once."""
        leaf = self.leaves[span.name]
        if x.dtype != leaf.dtype:
            raise ValueError(f"{span.name} is {leaf}, got {x.dtype}")
        if self._open[0] != span.name:
            self._open = (span.name, self._array(span.name))
        array = self._open[1][span.at]
        if span.rows is not None:
            array = array[slice(*span.rows)]
        array.write(np.ascontiguousarray(x)).result()
        self._left[span.name] -= x.nbytes
        added = checksums.part(x, _start(leaf, span))
        self.sums[span.name] = (self.sums[span.name] + added) % 2**32

    def _array(self, name: str, create: bool = False) -> Any:
        path = self._folder.resolve() / name.replace("/", ".")
        spec: dict[str, Any] = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{path}/"},
            "store_data_equal_to_fill_value": True,
        }
        if not create:
            return tensorstore.open(spec, context=_CONTEXT, write=True).result()
        shutil.rmtree(path)
        leaf = self.leaves[name]
        dtype = "bfloat16" if leaf.dtype.name == "bfloat16" else leaf.dtype.str
        spec["metadata"] = {
            "shape": list(leaf.shape),
            "chunks": list(_chunks(leaf)),
            "dtype": dtype,
            "compressor": None,
            "fill_value": None,
            "order": "C",
        }
        return tensorstore.open(spec, context=_CONTEXT, create=True).result()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns that there are no OCDBT files to merge, where none are wanted."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _chunks(leaf: Leaf) -> tuple[int, ...]:
    """Chunks of at most `PIECE` bytes, cut along the first axes: as spans are."""
    chunks = list(leaf.shape)
    size = leaf.nbytes
    for axis, length in enumerate(leaf.shape):
        if size <= PIECE:
            break
        row = size // length
        chunks[axis] = even_step(length, row)
        size = row * chunks[axis]
    return tuple(max(1, n) for n in chunks)
