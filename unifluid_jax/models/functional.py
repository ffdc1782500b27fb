"""Where Flax stops: a module becomes `init(key) -> params` and `bind(params) -> module`.

Everything outside `models/` sees nested dicts of arrays. A module is built under tracing, split
once into its static graph and its parameters, and merged again inside the step; nothing in it
changes during a step.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from unifluid_jax.errors import UserError, nearest

Initializer = Callable[..., jax.Array]
Params = dict[str, Any]


def param(
    init: Initializer,
    key: jax.Array,
    shape: Sequence[int],
    axes: Sequence[str | None],
    dtype: Any = jnp.float32,
) -> nnx.Param:
    """A parameter with one logical axis name per dimension.

    `sharding.py` maps the names to the mesh.

    Raises:
        ValueError: the number of names differs from the number of dimensions.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} needs {len(shape)} logical axes, got {tuple(axes)}")
    return nnx.Param(init(key, tuple(shape), dtype), axes=tuple(axes))


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Any:
    """`depth` equal layers as one module whose parameters carry a leading "layers" axis.

    One array per parameter whatever the depth: a checkpoint does not depend on how the layers are
    run.
    """
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: build(nnx.Rngs(key)))(keys)


def unstack(layers: Any, depth: int) -> list[Any]:
    """The single layers of a `stack`; of an `nnx.List` of them, themselves.

    Cut with `lax.split`, whose transpose is one concatenation; indexing would make the backward
    pass add up `depth` arrays of the full stacked size.
    """
    if isinstance(layers, nnx.List):
        return list(layers)
    leaves, structure = jax.tree.flatten(layers)
    slices = [jax.lax.split(leaf, (1,) * depth, axis=0) for leaf in leaves]
    return [
        jax.tree.unflatten(structure, [leaf[i].squeeze(0) for leaf in slices]) for i in range(depth)
    ]


# What a layer keeps of its activations for the backward pass, besides its input; the rest is
# computed anew. In the order of the memory they take: names of values in the layers.
KEPT: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": ("attention",),
    "qkv": ("attention", "qkv"),
    "up": ("attention", "qkv", "up"),
    "mlp": ("attention", "qkv", "up", "gate"),
}


def _offload(*names: str) -> Any:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


REMAT: dict[str, Any] = {
    **{name: jax.checkpoint_policies.save_only_these_names(*kept) for name, kept in KEPT.items()},
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    # The same values as "qkv" and "mlp", in the memory of the host.
    "offload_qkv": _offload(*KEPT["qkv"]),
    "offload_mlp": _offload(*KEPT["mlp"]),
}


def checkpointed(function: Any, policy: str | None, where: str, **options: Any) -> Any:
    """`function`, one layer, with the activations of its backward pass by a policy of `REMAT`.

    Args:
        policy: None keeps everything.
        where: the field of the config that names it, for messages.
        **options: of `jax.checkpoint`.

    Raises:
        UserError: there is no such policy.
    """
    if policy is None:
        return function
    if policy not in REMAT:
        raise UserError(f'{where} is "{policy}"{nearest(policy, REMAT)}: one of {", ".join(REMAT)}')
    return jax.checkpoint(function, policy=REMAT[policy], **options)


class Functional:
    """The functional face of a module.

    Args:
        build: makes the module from `nnx.Rngs`. Called under tracing, so it allocates nothing by
            itself.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        # Shapes, plans and fresh states all ask for it: traced once, then laid into each of them.
        self._init = jax.jit(
            lambda key: nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)))[1]), inline=True
        )

    @cached_property
    def _abstract(self) -> tuple[Any, Any]:
        return nnx.split(nnx.eval_shape(lambda: self._build(nnx.Rngs(0))))

    @property
    def axes(self) -> Params:
        """The tree of `init` with a tuple of logical axis names at every leaf.

        Stacked layers begin with "layers".
        """

        def names(variable: nnx.Variable) -> tuple[str | None, ...]:
            axes = variable.get_metadata()["axes"]
            return ("layers",) * (variable.get_value().ndim - len(axes)) + tuple(axes)

        is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
        state = jax.tree.map(names, self._abstract[1], is_leaf=is_variable)
        return nnx.to_pure_dict(state)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, a nested dict of arrays; meant for `jit` and `eval_shape`."""
        return self._init(key)

    def bind(self, params: Params) -> Any:
        """The module with these parameters.

        Raises:
            ValueError: `params` is not the tree of `init`.
        """
        graph, abstract = self._abstract
        expected = jax.tree.structure(nnx.to_pure_dict(abstract))
        if jax.tree.structure(params) != expected:
            raise ValueError(
                f"parameters do not fit the module: {jax.tree.structure(params)} given, "
                f"{expected} wanted"
            )
        return nnx.merge(graph, nnx.State(params))
