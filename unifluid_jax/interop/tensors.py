"""Named tensors that are read and written by parts.

A `Source` knows shapes and types of everything before it reads anything, and reads one `Span` at a
time; a `Sink` takes spans in any order. Nothing here holds more than the span at hand, except
`Memory`, which is all in memory on purpose.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from unifluid_jax import trees
from unifluid_jax.errors import UserError
from unifluid_jax.interop.rules import Leaf, Shape, Span

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@runtime_checkable  # tests check annotations
class Source(Protocol):
    """Tensors that can be read.

    Attributes:
        path: what the user gave, for messages.
        leaves: shape and type of every tensor, by name.
    """

    path: Path
    leaves: Mapping[str, Leaf]

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""

    def read(self, span: Span) -> np.ndarray:
        """The numbers; an array of its own or a view that the caller does not write to."""


@runtime_checkable
class Sink(Protocol):
    """Tensors that can be written."""

    def write(self, span: Span, x: np.ndarray) -> None:
        """Puts the numbers in their place; `x` has the type of the tensor."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie.

    Attributes:
        file: name of the file.
        offset: of the first element, bytes.
        strides: elements from one to the next along each axis; None is C order.
    """

    file: Path
    offset: int
    strides: Shape | None = None


class RawTensors:
    """A `Source` of tensors that lie uncompressed in files, wherever a directory says.

    They are read, not mapped: pages of a mapped file count as memory of the process.
    """

    def __init__(self, path: Path, leaves: Mapping[str, Leaf], places: Mapping[str, Place]):
        self.path, self.leaves, self.places = path, leaves, places

    def where(self, name: str) -> str:
        return str(self.places[name].file)

    def read(self, span: Span) -> np.ndarray:
        leaf, place = self.leaves[span.name], self.places[span.name]
        if place.strides is not None:
            return part(self._strided(span.name), span)
        shape = leaf.shape[len(span.at) :]
        first = 0
        for axis, index in enumerate(span.at):
            first += index * math.prod(leaf.shape[axis + 1 :])
        if span.rows is not None:
            start, stop = span.rows
            first += start * math.prod(shape[1:])
            shape = (stop - start, *shape[1:])
        return self._elements(span.name, first, math.prod(shape)).reshape(shape)

    def _strided(self, name: str) -> np.ndarray:
        leaf, place = self.leaves[name], self.places[name]
        if math.prod(leaf.shape) == 0:
            return np.empty(leaf.shape, leaf.dtype)
        reach = 1 + sum((n - 1) * s for n, s in zip(leaf.shape, place.strides, strict=True))
        strides = tuple(s * leaf.dtype.itemsize for s in place.strides)
        flat = self._elements(name, 0, reach)
        return np.lib.stride_tricks.as_strided(flat, leaf.shape, strides, writeable=False)

    def _elements(self, name: str, first: int, count: int) -> np.ndarray:
        leaf, place = self.leaves[name], self.places[name]
        size = leaf.dtype.itemsize
        try:
            data = np.fromfile(
                place.file, np.uint8, count * size, offset=place.offset + first * size
            )
        except OSError as error:
            raise UserError(f"cannot read {name} from {place.file}: {error.strerror}") from error
        if len(data) < count * size:
            raise UserError(
                f"{place.file} ends inside {name}: the file is cut short, fetch it anew"
            )
        return data.view(leaf.dtype)


class Memory:
    """Arrays in memory, as a `Source` and as a `Sink`."""

    def __init__(self, arrays: Mapping[str, np.ndarray], path: Path = Path("memory")):
        self.path, self.arrays = path, dict(arrays)
        self.leaves = {name: Leaf(x.shape, x.dtype) for name, x in self.arrays.items()}

    @classmethod
    def empty(cls, leaves: Mapping[str, Leaf]) -> "Memory":
        """Zeros, to be written."""
        return cls({name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()})

    def where(self, name: str) -> str:
        return str(self.path)

    def read(self, span: Span) -> np.ndarray:
        return part(self.arrays[span.name], span)

    def write(self, span: Span, x: np.ndarray) -> None:
        if span.rows is None:
            self.arrays[span.name][span.at] = x
        else:
            self.arrays[span.name][span.at][slice(*span.rows)] = x


def leaves_of(tree: Any) -> dict[str, Leaf]:
    """Shape and type of every leaf of a tree, by path."""
    return {
        name: Leaf(tuple(x.shape), np.dtype(x.dtype)) for name, x in trees.flatten(tree).items()
    }


def portions(leaves: Mapping[str, Leaf], size: int) -> list[list[str]]:
    """The names of leaves in their order, cut where a portion would exceed `size` bytes.

    A leaf that is larger has a portion of its own; of no leaves there is one, which is empty.
    """
    found: list[list[str]] = [[]]
    filled = 0
    for name, leaf in leaves.items():
        if found[-1] and filled + leaf.nbytes > size:
            found.append([])
            filled = 0
        found[-1].append(name)
        filled += leaf.nbytes
    return found


def part(x: np.ndarray, span: Span) -> np.ndarray:
    """The span of an array, a view."""
    x = x[span.at]
    return x if span.rows is None else x[slice(*span.rows)]
