"""Where arrays live: the mesh, and one table from the logical axes of parameters to its axes.

The models name the axes of their parameters (`Functional.axes`); nobody else decides a placement.
Nothing is ever built whole and then moved:

    abstract = jax.eval_shape(init, key)
    where = state_shardings(abstract, shardings(model.axes, abstract["params"], mesh), mesh)
    state = jax.jit(init, out_shardings=where)(key)

Inside the step, under `jax.set_mesh(mesh)`, the models say where a value must lie: `gathered`
weights, activations cut by `over_replicas`. Without a mesh both change nothing.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from unifluid_jax import trees
from unifluid_jax.errors import UserError, nearest

Tree = Any

# data: replicas. fsdp: replicas that cut parameters and moments among themselves. tensor: devices
# that share the work of one layer, so the neighbours with the fastest links: the last axis.
AXES = ("data", "fsdp", "tensor")

# Rows of a batch lie over these.
REPLICAS = ("data", "fsdp")
# The vocabulary is cut over these.
VOCABULARY = ("tensor", "fsdp")

# The one table. What goes into a matrix is cut over fsdp, what it widens to over tensor, so that a
# pair of matrices (in, out) needs one sum over tensor (Megatron) and every matrix is cut both ways.
# fsdp never cuts the last dimension of the decoder's matrices: a shard of 2304 / 16 = 144 columns
# would not fill the TPU's tiles of 128, and its gathering would have to interleave them. The
# vocabulary is cut over both and never gathered: rows are looked up, and logits computed, where
# they lie.
LOGICAL_AXES: Mapping[str, str | tuple[str, ...] | None] = {
    "layers": None,
    "embed": "fsdp",
    "embed_out": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "head_dim_in": "fsdp",
    "mlp": "tensor",
    "mlp_in": ("tensor", "fsdp"),
    "vocab": VOCABULARY,
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


def make_mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
        config: the sizes `data`, `fsdp` and `tensor` inside a slice, whose devices have fast links
            (ICI); and, where there are several slices, the same three in `dcn`, over the slow links
            between them. One of each may be -1: what is left. An axis of the mesh has the product
            of both sizes, neighbours inside a slice first.
        devices: all devices by default.

    Raises:
        UserError: the sizes do not multiply to the number of devices or slices.
    """
    devices = jax.devices() if devices is None else devices
    slices = _slices(devices)
    outer = config.get("dcn") or ConfigDict(dict.fromkeys(AXES, 1))
    if len(slices) == 1 and -1 not in (outer[axis] for axis in AXES):
        # Devices without slices: blocks of neighbours stand for them.
        count = math.prod(outer[axis] for axis in AXES)
        if count > 1 and len(devices) % count == 0:
            slices = np.array_split(np.asarray(devices, object), count)
    dcn = _fill("config.mesh.dcn", outer, len(slices), "slices")
    ici = _fill("config.mesh", config, len(devices) // len(slices), "devices")
    blocks = [
        mesh_utils.create_device_mesh(ici, list(block), allow_split_physical_axes=True)
        for block in slices
    ]
    # [data of dcn, fsdp of dcn, tensor of dcn, data, fsdp, tensor], then the pairs beside each
    # other.
    grid = np.stack(blocks).reshape(*dcn, *ici).transpose(0, 3, 1, 4, 2, 5)
    grid = grid.reshape([a * b for a, b in zip(dcn, ici, strict=True)])
    # Auto: inside the step the compiler lays out what it computes, from the placements of the
    # state and the batch. Explicit axes (the default of make_mesh) would make the placement a part
    # of every value's type, and each gather and reshape of the models would have to spell it out.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[Any]) -> list[list[Any]]:
    """Devices by TPU slice; other kinds of devices know none and count as one."""
    groups = defaultdict(list)
    for device in devices:
        groups[getattr(device, "slice_index", 0)].append(device)
    if len({len(group) for group in groups.values()}) > 1:
        raise UserError(
            "slices of unlike sizes make no mesh: "
            + ", ".join(str(len(group)) for group in groups.values())
        )
    return [groups[index] for index in sorted(groups)]


def _fill(where: str, config: ConfigDict, count: int, of: str) -> list[int]:
    """The three sizes with what is left for -1."""
    sizes = [config[axis] for axis in AXES]
    text = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{where} ({text}): sizes are at least 1, and one of them may be -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        raise UserError(f"{where} ({text}) does not fit {count} {of}")
    return sizes


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
    name: str,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    large: int,
) -> PartitionSpec:
    where = f"{name} {list(shape)} with axes {axes}"
    if len(axes) != len(shape):
        raise ValueError(f"{where}: {len(axes)} axes for {len(shape)} dimensions")
    for axis in axes:
        if axis is not None and axis not in LOGICAL_AXES:
            raise ValueError(f'{where}: "{axis}" is unknown{nearest(axis, LOGICAL_AXES)}')
    wanted = [_mesh_axes(axis) for axis in axes]
    for mesh_axis in AXES:
        if sum(mesh_axis in cut for cut in wanted) > 1:
            raise ValueError(f'{where}: two dimensions would be cut over "{mesh_axis}"')

    is_large = math.prod(shape) >= large
    if len([axis for axis in axes if axis != "layers"]) < 2 and not is_large:
        # A vector is less than the trouble of gathering it for every use.
        return PartitionSpec(*(None for _ in axes))
    spec = []
    for axis, size, cut in zip(axes, shape, wanted, strict=True):
        pieces = math.prod(mesh.shape[a] for a in cut)
        if size % pieces:
            if is_large and axis not in _MAY_STAY_WHOLE:
                name = " x ".join(f"config.mesh.{a} = {mesh.shape[a]}" for a in cut)
                raise UserError(f"{where}: {axis} = {size} does not divide by {name}")
            # Of two mesh axes the first may still fit.
            cut = next((c for c in (cut[:1],) if c != cut and size % mesh.shape[c[0]] == 0), ())
        spec.append(cut)
    cuts = math.prod(mesh.shape[a] for cut in spec for a in cut)
    if is_large and cuts == 1 and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        raise UserError(f"{where}: would stay whole on every device of the mesh {_sizes(mesh)}")
    return PartitionSpec(*(cut[0] if len(cut) == 1 else cut or None for cut in spec))


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    return _as_tuple(axis and LOGICAL_AXES[axis])


def _sizes(mesh: Mesh | AbstractMesh) -> str:
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


def put(tree: Tree, described: Tree) -> Tree:
    """Arrays that every process holds whole, placed as these `jax.ShapeDtypeStruct`s say."""

    def place(x: Any, to: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(to.shape, to.sharding, np.asarray(x).__getitem__)

    return jax.tree.map(place, tree, described)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all replicas, cut parameters or not; the devices of a tensor group share them."""
    return NamedSharding(mesh, PartitionSpec(REPLICAS))


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

    Without a mesh they are left to the program that takes them.
    """
    if mesh is None:
        return tree

    def place(x: np.ndarray | jax.Array) -> jax.Array:
        whole = divisible(len(x), mesh) != len(x)
        return jax.device_put(x, replicated(mesh) if whole else batch_sharding(mesh))

    return jax.tree.map(place, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """An array on the host, whole, whatever devices and processes hold it."""
    if x.is_fully_addressable:
        return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)


def context() -> AbstractMesh | None:
    """The mesh of the step being traced, from `jax.set_mesh`; None outside, or inside a shard."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXES or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def platform() -> str:
    """Kind of the devices that a value will live on: "tpu", "gpu" or "cpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    known = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if known is None else known.platform


def vocabulary_mesh(size: int, rows: int) -> AbstractMesh | None:
    """The mesh of `context` where it cuts a vocabulary of this size, and so many rows of a batch.

    None: the table of embeddings is used like any array.
    """
    mesh = context()
    if mesh is None or rows % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return None
    pieces = math.prod(mesh.shape[axis] for axis in VOCABULARY)
    return None if pieces == 1 or size % pieces else mesh


def over_replicas(x: jax.Array) -> jax.Array:
    """Rows over all replicas; the compiler chooses for the other dimensions."""
    mesh = context()
    if mesh is None or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(REPLICAS, *rest))


def gathered(module: Any, dtype: str) -> Any:
    """A module with its matrices in the compute type and whole along fsdp, ready to be used.

    The one place where parameters leave their placement. They are cast first, so that they travel
    in the compute type, and so do their gradients on the way back, which are cut again as the
    parameters are. To be called inside what is rematerialised: the backward pass then gathers
    anew, and no device keeps a second copy of the model. Vectors stay as they are.
    """
    mesh = context()

    def gather(variable: nnx.Variable) -> nnx.Variable:
        value, axes = variable.get_value(), variable.get_metadata()["axes"]
        if len(axes) < 2:
            return variable
        axes = ("layers",) * (value.ndim - len(axes)) + axes
        value = value.astype(dtype)
        if mesh is not None and mesh.shape["fsdp"] > 1:
            stored = _spec("", axes, value.shape, mesh, value.size + 1)
            if any("fsdp" in _as_tuple(cut) for cut in stored):
                value = _gather(stored, value)
        return variable.replace(value)

    return jax.tree.map(gather, module, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(stored: PartitionSpec, value: jax.Array) -> jax.Array:
    whole = [tuple(a for a in _as_tuple(cut) if a != "fsdp") or None for cut in stored]
    value = jax.lax.with_sharding_constraint(value, stored)
    return jax.lax.with_sharding_constraint(value, PartitionSpec(*whole))


def _gather_forward(stored, value):
    return _gather(stored, value), None


def _gather_backward(stored, _, gradient):
    # Without this the sum over the replicas would come out whole on every device.
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather.defvjp(_gather_forward, _gather_backward)


def _as_tuple(cut: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (cut,) if isinstance(cut, str) else cut or ()
