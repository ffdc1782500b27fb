"""Checksums of arrays: one number for any placement on devices, and for any cut into parts.

A sum of the values' bits modulo 2^32, each times an odd number that depends on its place: any
changed bit changes it, and any other damage but once in 2^32. Integers add up the same in every
order. `of` computes it on the devices where an array lies, `part` on the host, where arrays pass by
in pieces; both give the same.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, ArrayLike, Shaped, UInt32

from unifluid_jax import trees

Tree = Any

_KNUTH = 2654435761  # Knuth's multiplicative hash
_STEP = 1 << 20  # numbers that the host looks at together
_BLOCK = 1 << 22  # and a device


def of(x: Shaped[ArrayLike, "..."], dtype: np.dtype | None = None) -> UInt32[Array, ""]:
    """The checksum of an array, or of what it was before it was widened from `dtype`.

    Beyond the array it takes `_BLOCK` numbers of memory on a device, or one of its first axis's
    entries where that is more.
    """
    where = getattr(x, "sharding", None)
    return _of(x, dtype, where if isinstance(where, NamedSharding) else None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _of(
    x: Shaped[Array, "..."], dtype: np.dtype | None, where: NamedSharding | None
) -> UInt32[Array, ""]:
    if where is None:
        return _shard(x, dtype, (0,) * x.ndim, x.shape)
    cuts = [() if cut is None else cut if isinstance(cut, tuple) else (cut,) for cut in where.spec]
    cuts += [()] * (x.ndim - len(cuts))

    def local(shard: Shaped[Array, "..."]) -> UInt32[Array, ""]:
        indices = [jax.lax.axis_index(cut) if cut else 0 for cut in cuts]
        first = tuple(i * size for i, size in zip(indices, shard.shape, strict=True))
        axes = tuple(axis for cut in cuts for axis in cut)
        total = _shard(shard, dtype, first, x.shape)
        return jax.lax.psum(total, axes) if axes else total

    # Told by hand, for the compiler would cut blocks across devices.
    return jax.shard_map(local, mesh=where.mesh, in_specs=where.spec, out_specs=jax.P())(x)


def _shard(
    x: Shaped[Array, "..."], dtype: np.dtype | None, first: Sequence[Any], shape: Sequence[int]
) -> UInt32[Array, ""]:
    """What a part that begins at the index `first` adds to the checksum of an array.

    Blocks of it in turn: not every compiler fuses a sum with what it sums up.
    """
    rows = x.shape[0] if x.ndim else 1
    height = max(1, _BLOCK * rows // max(1, x.size))
    if height >= rows:
        return _block(x, dtype, first, shape)

    def add(i: Any, total: UInt32[Array, ""]) -> UInt32[Array, ""]:
        block = jax.lax.dynamic_slice_in_dim(x, i * height, height)
        return total + _block(block, dtype, (first[0] + i * height, *first[1:]), shape)

    # The first one apart: the sum has its type from it.
    total = jax.lax.fori_loop(1, rows // height, add, _block(x[:height], dtype, first, shape))
    if rest := rows % height:
        total += _block(x[-rest:], dtype, (first[0] + rows - rest, *first[1:]), shape)
    return total


def _block(
    x: Shaped[Array, "..."], dtype: np.dtype | None, first: Sequence[Any], shape: Sequence[int]
) -> UInt32[Array, ""]:
    x = x if dtype is None else x.astype(dtype)
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype)).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim, begin in enumerate(first):
        stride = jnp.uint32(math.prod(shape[dim + 1 :]) % 2**32)
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) + jnp.uint32(begin)
        place += index * stride
    place *= jnp.uint32(_KNUTH)
    place ^= place >> 15
    return jnp.sum(bits * (place * jnp.uint32(2) + jnp.uint32(1)), dtype=jnp.uint32)


def part(x: np.ndarray, start: int = 0) -> int:
    """What consecutive numbers add to the checksum of their array, modulo 2^32.

    Args:
        start: index of the first one in the array laid out in C order.
    """
    flat = np.ascontiguousarray(x).reshape(-1)
    unsigned = np.dtype(np.uint8) if flat.dtype == np.bool_ else _unsigned(flat.dtype)
    flat, total = flat.view(unsigned), 0
    for i in range(0, len(flat), _STEP):
        bits = flat[i : i + _STEP].astype(np.uint32)
        place = np.arange(len(bits), dtype=np.uint32)
        place += np.uint32((start + i) % 2**32)
        place *= np.uint32(_KNUTH)
        place ^= place >> np.uint32(15)
        place <<= np.uint32(1)
        place += np.uint32(1)
        total += int(np.sum(bits * place, dtype=np.uint32))
    return total % 2**32


def _unsigned(dtype: Any) -> np.dtype:
    return np.dtype({1: np.uint8, 2: np.uint16, 4: np.uint32}[np.dtype(dtype).itemsize])


def kind(leaf: Any) -> str:
    """Type and shape, like "float32[8, 16]"."""
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def leaves(tree: Tree) -> dict[str, list[Any]]:
    """[kind, checksum] of every array of a tree, by name."""
    named = trees.flatten(tree)
    sums = jax.device_get({name: of(leaf) for name, leaf in named.items()})
    return {name: [kind(leaf), int(sums[name])] for name, leaf in named.items()}


def differing(tree: Tree, wanted: Mapping[str, Iterable[Any]]) -> list[str]:
    """Names of the arrays of a tree that are not those of which `leaves` was taken.

    An array may be wider than it was then.
    """
    named = trees.flatten(tree)
    dtypes = {name: np.dtype(wanted[name][0].partition("[")[0]) for name in named}
    sums = jax.device_get(
        {
            name: of(leaf, None if leaf.dtype == dtypes[name] else dtypes[name])
            for name, leaf in named.items()
        }
    )
    return [name for name, found in sums.items() if int(found) != wanted[name][1]]
