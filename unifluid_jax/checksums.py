"""Checksums of arrays: one number for any placement on devices, and for any cut into parts.

A sum of the values' bits modulo 2^32, each times an odd number that depends on its place: any
changed bit changes it, and any other damage but once in 2^32. Integers add up the same in every
order. `of` computes it on the devices where an array lies, `part` on the host, where arrays pass by
in pieces; both give the same.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

from unifluid_jax import trees

Tree = Any

_KNUTH = 2654435761  # Knuth's multiplicative hash
_STEP = 1 << 20  # numbers that the host looks at together


@functools.partial(jax.jit, static_argnums=1)
def of(x: Shaped[Array, "..."], dtype: np.dtype | None = None) -> UInt32[Array, ""]:
    """The checksum of an array, or of what it was before it was widened from `dtype`."""
    x = x if dtype is None else x.astype(dtype)
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype)).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim in range(bits.ndim):
        stride = jnp.uint32(math.prod(bits.shape[dim + 1 :]) % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * stride
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
    start *= flat.dtype.itemsize // unsigned.itemsize
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
    return np.dtype({1: np.uint8, 2: np.uint16}.get(np.dtype(dtype).itemsize, np.uint32))


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
