"""Where arrays live: the mesh, and one table from the logical axes of parameters to its axes.

The models name the axes of their parameters (`Functional.axes`); nobody else decides a placement.
Nothing is ever built whole and then moved:

    abstract = jax.eval_shape(init, key)
    where = state_shardings(abstract, shardings(model.axes, abstract["params"], mesh), mesh)
    state = jax.jit(init, out_shardings=where)(key)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from unifluid_jax import trees
from unifluid_jax.errors import UserError, nearest

Tree = Any

# data: replicas. fsdp: replicas that cut parameters and moments among themselves. tensor: devices
# that share the work of one layer, so the neighbours with the fastest links: the last axis.
AXES = ("data", "fsdp", "tensor")

# The one table. Width is cut over fsdp, what a matrix widens to over tensor, so that a pair of
# matrices (in, out) needs one sum over tensor (Megatron) and every matrix is cut both ways.
LOGICAL_AXES: Mapping[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "vision_embed": "fsdp",
    "vision_heads": "tensor",
    "vision_mlp": "tensor",
    "head_width": "fsdp",
    "head_mlp": "tensor",
    "conv_in": None,
    "conv_out": "fsdp",
}

# Multi-query attention has fewer key heads than tensor shards, and then repeats them.
_MAY_STAY_WHOLE = frozenset({"kv_heads"})

# From so many elements on (16 MiB in float32, and as much for EMA and each moment), staying whole
# on every device is an error. Smaller ones whose sizes do not divide stay whole silently.
LARGE = 1 << 22


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
        config: the sizes `data`, `fsdp` and `tensor`; one of them may be -1: what is left.
        devices: all devices by default.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config[axis] for axis in AXES]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"config.mesh ({text}): sizes are at least 1, and one of them may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(f"config.mesh ({text}) does not fit {len(devices)} devices")
    # Auto: inside the step the compiler lays out what it computes, from the placements of the
    # state and the batch. Explicit axes (the default of make_mesh) would make the placement a part
    # of every value's type, and each gather and reshape of the models would have to spell it out.
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def shardings(axes: Tree, params: Tree, mesh: Mesh, large: int = LARGE) -> Tree:
    """The placement of every parameter.

    Args:
        axes: tree of tuples with a logical axis name, or None, per dimension.
        params: the tree of parameters, abstract or not.
        mesh: from `make_mesh`.
        large: parameters from this number of elements on must be cut as the table says.

    Raises:
        UserError: a large parameter that some mesh axis does not divide, or that would stay whole
            on every device of a mesh that cuts parameters.
        ValueError: names that are not in the table, that do not match the shape, or two dimensions
            of a parameter on one mesh axis: bugs of a model.
    """

    def place(keys: tuple[Any, ...], names: tuple[str | None, ...], param: Any) -> NamedSharding:
        name = trees.leaf_name(keys)
        return NamedSharding(mesh, _spec(name, names, param.shape, mesh, large))

    return jax.tree_util.tree_map_with_path(
        place, axes, params, is_leaf=lambda x: isinstance(x, tuple)
    )


def _spec(
    name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh, large: int
) -> PartitionSpec:
    where = f"{name} {list(shape)} with axes {axes}"
    if len(axes) != len(shape):
        raise ValueError(f"{where}: {len(axes)} axes for {len(shape)} dimensions")
    for axis in axes:
        if axis is not None and axis not in LOGICAL_AXES:
            raise ValueError(f'{where}: "{axis}" is unknown{nearest(axis, LOGICAL_AXES)}')
    wanted = [axis and LOGICAL_AXES[axis] for axis in axes]
    for mesh_axis in AXES:
        if wanted.count(mesh_axis) > 1:
            raise ValueError(f'{where}: two dimensions would be cut over "{mesh_axis}"')

    is_large = math.prod(shape) >= large
    spec = []
    for axis, size, mesh_axis in zip(axes, shape, wanted, strict=True):
        if mesh_axis and size % mesh.shape[mesh_axis]:
            if is_large and axis not in _MAY_STAY_WHOLE:
                raise UserError(
                    f"{where}: {axis} = {size} does not divide by config.mesh.{mesh_axis} = "
                    f"{mesh.shape[mesh_axis]}"
                )
            mesh_axis = None
        spec.append(mesh_axis)
    cuts = math.prod(mesh.shape[mesh_axis] for mesh_axis in spec if mesh_axis)
    if is_large and cuts == 1 and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        raise UserError(f"{where}: would stay whole on every device of the mesh {_sizes(mesh)}")
    return PartitionSpec(*spec)


def _sizes(mesh: Mesh) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def state_shardings(state: Tree, param_shardings: Tree, mesh: Mesh) -> Tree:
    """The placement of a train state: what mirrors a parameter lies as it does, the rest is whole.

    Args:
        state: any tree that holds trees like the parameters: themselves, EMA, moments. A leaf
            mirrors a parameter when its path ends with the parameter's path.
        param_shardings: from `shardings`.
        mesh: of these.
    """
    where = trees.flatten(param_shardings)

    def place(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(keys)):
            sharding = where.get(trees.leaf_name(keys[start:]))
            if sharding is not None and len(sharding.spec) == leaf.ndim:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def abstract(tree: Tree, where: Tree) -> Tree:
    """The tree as `jax.ShapeDtypeStruct`s with shardings: what a checkpoint is restored onto."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, where
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all replicas, cut parameters or not; the devices of a tensor group share them."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch(rows: int, parts: int, mesh: Mesh) -> None:
    """Makes sure that a batch can be spread over the mesh.

    Args:
        rows: of the global batch.
        parts: that it is cut into for gradient accumulation.

    Raises:
        UserError: it cannot.
    """
    if parts < 1:
        raise UserError(f"config.train.accumulate is {parts}: set it to 1 or more")
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows < 1 or rows % (replicas * parts):
        raise UserError(
            f"config.input.batch_size = {rows} does not divide by the {replicas} replicas of the "
            f"mesh {_sizes(mesh)} times config.train.accumulate = {parts}"
        )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch of which this process holds its own rows.

    An explicit transfer: it may stand in a loop under `jax.transfer_guard("disallow")`.
    """
    where = batch_sharding(mesh)
    # With several processes JAX makes the array by transfers that it does not call explicit.
    with jax.transfer_guard("allow"):
        return {
            name: jax.make_array_from_process_local_data(where, rows)
            for name, rows in batch.items()
        }


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """The rows of a global batch of so many that the devices of this process hold, in order.

    `shard_batch` takes them so. Processes that share a tensor group hold the same rows.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (index,) in indices for row in range(rows)[index]})


def mesh_of(params: Tree) -> Mesh | None:
    """The mesh that parameters lie on; None when they lie on a single device, or on none yet."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return where.mesh if isinstance(where, NamedSharding) else None


def divisible(rows: int, mesh: Mesh | None) -> int:
    """The least number of rows, not below `rows`, that the replicas of a mesh can share."""
    replicas = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // replicas) * replicas


def spread(tree: Tree, mesh: Mesh | None) -> Tree:
    """Arrays that every process holds whole, their rows over the replicas where these divide them.

    Without a mesh they go to the default device.
    """
    if mesh is None:
        return jax.device_put(tree)

    def place(x: np.ndarray | jax.Array) -> jax.Array:
        whole = divisible(len(x), mesh) != len(x)
        return jax.device_put(x, replicated(mesh) if whole else batch_sharding(mesh))

    return jax.tree.map(place, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """An array on the host, whole, whatever devices and processes hold it."""
    if x.is_fully_addressable:
        return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)
