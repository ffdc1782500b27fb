"""LoRA (Hu et al. 2021): a pretrained matrix W stays as it is, `W + alpha / rank * A B` is used.

A pure transformation of the parameter tree: the model knows nothing of it. Adapters are a subtree
"lora" beside the parameters, with A and B at the path of the parameter that they adapt:

    backbone/layers/q              [layers, D, H, K]
    lora/backbone/layers/q/a       [layers, D, rank]
    lora/backbone/layers/q/b       [layers, rank, H, K]

B begins as zeros, so that an adapted model begins as exactly the one that it adapts. What is
trained is said where it always is, in `config.optim.rules`: (("lora/.*", {}), (".*", {"freeze":
True})) is LoRA alone; one more rule trains, say, the norms in full beside it.

The sum is taken inside the step, and its gradient passes through one of W's own size: what LoRA
saves here are moments, averages and checkpoints, which are as small as the adapters.
"""

import dataclasses
import math
import re
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from unifluid_jax import trees
from unifluid_jax.errors import UserError
from unifluid_jax.models.functional import Functional, Params

BRANCH = "lora"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The group `config.lora`.

    Attributes:
        rank: of every adapter.
        alpha: adapters are scaled by alpha / rank: the learning rate need not follow the rank.
        target: regular expression over whole paths of parameters: "backbone/layers/(q|v)". What it
            matches are matrices, or stacks of them; heads and their dims count as one dimension.

    Raises:
        UserError: rank or alpha makes no sense, or the target is no regular expression.
    """

    rank: int
    alpha: float
    target: str

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"config.lora.rank is {self.rank}: set it to 1 or more")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"config.lora.alpha is {self.alpha}: set it above 0")
        try:
            re.compile(self.target)
        except re.error as error:
            raise UserError(
                f'config.lora.target "{self.target}" is no regular expression: {error.msg}'
            ) from None


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A parameter as a stack of matrices: how many of its dims are stacked, in and out.

    Attributes:
        shape, axes: of the parameter.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stacked: int
    inputs: int

    def adapters(self, whole: tuple, rank: Any) -> dict[str, tuple]:
        """What A and B have along their dims, of what the parameter has along its own."""
        layers, rest = whole[: self.stacked], whole[self.stacked :]
        return {
            "a": (*layers, *rest[: self.inputs], rank),
            "b": (*layers, rank, *rest[self.inputs :]),
        }


class Adapted:
    """A model with adapters, behind the face of a `Functional`.

    Raises:
        UserError: the target matches no parameter, or one that is no matrix.
    """

    def __init__(self, model: Functional, config: LoraConfig):
        self._model, self._config = model, config
        abstract = jax.eval_shape(model.init, jax.random.key(0))
        axes = jax.tree.leaves(model.axes, is_leaf=lambda x: isinstance(x, tuple))
        target = re.compile(config.target)
        self._matrices = {
            name: _matrix(name, leaf.shape, axes)
            for (name, leaf), axes in zip(trees.flatten(abstract).items(), axes, strict=True)
            if target.fullmatch(name)
        }
        if not self._matrices:
            raise UserError(
                f'config.lora.target "{config.target}" matches no parameter; they are like '
                f'"{next(iter(trees.flatten(abstract)))}"'
            )

    @cached_property
    def axes(self) -> Params:
        """The model's logical axes and those of the adapters; that of the rank is never cut."""
        sides = {name: m.adapters(m.axes, None) for name, m in self._matrices.items()}
        return {**self._model.axes, BRANCH: _nested(sides)}

    def init(self, key: jax.Array) -> Params:
        """The model's fresh parameters, and fresh adapters beside them; to be traced."""
        return {**self._model.init(key), BRANCH: self.adapters(key)}

    def adapters(self, key: jax.Array) -> Params:
        """Fresh adapters: A random, with `A x` of x's size; B zero."""
        fresh = {}
        keys = jax.random.split(jax.random.fold_in(key, 1), len(self._matrices))
        for key, (name, m) in zip(keys, self._matrices.items(), strict=True):
            shapes = m.adapters(m.shape, self._config.rank)
            size = math.prod(shapes["a"][m.stacked : -1]) ** -0.5
            fresh[name] = {
                "a": size * jax.random.normal(key, shapes["a"]),
                "b": jnp.zeros(shapes["b"]),
            }
        return _nested(fresh)

    def bind(self, params: Params) -> Any:
        """The module of the parameters with their adapters added."""
        return self._model.bind(self.merge(params))

    def merge(self, params: Params) -> Params:
        """Parameters of the model itself: `W + alpha / rank * A B` where there are adapters."""
        return merge(params, self._config.alpha)


def base(params: Params) -> Params:
    """The parameters without their adapters."""
    return {name: node for name, node in params.items() if name != BRANCH}


def merge(params: Params, alpha: float) -> Params:
    """The parameters with their adapters added, as a model without adapters takes them."""
    adapters = trees.flatten(params[BRANCH])

    def leaf(keys: tuple[Any, ...], w: jax.Array) -> jax.Array:
        name = trees.leaf_name(keys)
        if f"{name}/a" not in adapters:
            return w
        a, b = adapters[f"{name}/a"], adapters[f"{name}/b"]
        product = lambda a, b: jnp.tensordot(a, b, axes=1)  # noqa: E731
        for _ in range((a.ndim + b.ndim - 2) - w.ndim):  # stacked dims, which both have
            product = jax.vmap(product)
        return w + (alpha / a.shape[-1]) * product(a, b).astype(w.dtype)

    return jax.tree_util.tree_map_with_path(leaf, base(params))


def _matrix(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> _Matrix:
    stacked = axes.count("layers")
    # Heads and the dims within a head are one side of a matrix.
    sides: list[int] = []
    for axis in axes[stacked:]:
        if axis in ("head_dim", "head_dim_in") and sides:
            sides[-1] += 1
        else:
            sides.append(1)
    if len(sides) != 2:
        raise UserError(
            f"config.lora.target matches {name} {list(shape)}, which is no matrix: leave it out"
        )
    return _Matrix(shape, axes, stacked, sides[0])


def _nested(flat: dict[str, Any]) -> Params:
    """A tree of nested dicts from paths like "backbone/layers/q"."""
    tree: Params = {}
    for name, value in flat.items():
        *outer, last = name.split("/")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
