"""AdamW, its schedule, and the average of the weights; who decays or is frozen is said by rules.

UniFluid is known to train with AdamW at 1e-4; everything else here is our choice. Muon (Jordan et
al. 2024) in place of Adam, for matrices that a rule names, is an extension.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from unifluid_jax import trees
from unifluid_jax.errors import UserError, nearest

Tree = Any


def schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, constant, decay over the last steps of the run.

    Args:
        config: `lr`; `warmup_steps` (step 0 already moves, with lr / warmup_steps); `decay`, one of
            "none", "linear", "cosine" and "sqrt" (1 - sqrt, the cool-down of Hagele et al. 2024);
            `decay_steps`, how many steps it takes, -1 for all after the warm-up; `end_scale`, the
            final rate as a share of `lr`.
        total_steps: steps of the run.

    Raises:
        UserError: an unknown decay, or a warm-up and a decay that do not fit into the run.
    """
    warmup, length = config.warmup_steps, config.decay_steps
    length = total_steps - warmup if length == -1 else length
    end = config.lr * config.end_scale
    decays: dict[str, Callable[[], optax.Schedule]] = {
        "none": lambda: optax.constant_schedule(config.lr),
        "linear": lambda: optax.linear_schedule(config.lr, end, length),
        "cosine": lambda: optax.cosine_decay_schedule(config.lr, length, alpha=config.end_scale),
        "sqrt": lambda: _sqrt_schedule(config.lr, end, length),
    }
    if config.decay not in decays:
        hint = nearest(config.decay, decays)
        raise UserError(f'config.optim.decay "{config.decay}" is unknown{hint}')
    if config.decay == "none":
        length = 0
    elif length < 1:
        raise UserError(
            f"config.optim.decay_steps must be at least 1, or -1 for all {total_steps} steps "
            f"after a warm-up of {warmup}; got {config.decay_steps}"
        )
    if warmup < 0 or warmup + length > total_steps:
        raise UserError(
            f"config.optim: {warmup} warm-up and {length} decay steps do not fit into a run of "
            f"{total_steps} steps"
        )
    return optax.join_schedules(
        [
            lambda step: config.lr * (step + 1) / max(warmup, 1),
            optax.constant_schedule(config.lr),
            decays[config.decay](),
        ],
        boundaries=[warmup, total_steps - length],
    )


def _sqrt_schedule(start: float, end: float, steps: int) -> optax.Schedule:
    def rate(step: Int[Array, ""] | int) -> Float[Array, ""]:
        return end + (start - end) * (1 - jnp.sqrt(jnp.clip(step / steps, 0, 1)))

    return rate


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What `config.optim.rules` may say of a parameter, and what holds where they say nothing.

    Attributes:
        decay: multiplies the weight decay.
        lr_scale: multiplies the learning rate.
        freeze: the parameter never changes and has neither gradient, optimizer state nor average.
        muon: which dims of a matrix are its inputs; the dims behind them are its outputs, those
            before them are stacked layers. Its momentum is made orthogonal (Muon) and scaled to
            the size of Adam's updates (Liu et al. 2025), so that `lr` and `decay` mean the same.
            Empty: Adam.
    """

    decay: float = 1.0
    lr_scale: float = 1.0
    freeze: bool = False
    muon: tuple[int, ...] = ()

    def __post_init__(self):
        # A stored config brings a list.
        object.__setattr__(self, "muon", tuple(self.muon))

    def matrix(self, dims: int) -> MuonDimensionNumbers | None:
        """Inputs and outputs of a parameter of so many dims, None where Adam is to update it."""
        if not self.muon:
            return None
        return MuonDimensionNumbers(self.muon, tuple(range(max(self.muon) + 1, dims)))


def _is_matrix(entry: Any) -> bool:
    return isinstance(entry, MuonDimensionNumbers)


def _is_entry(node: Any) -> bool:
    return isinstance(node, MuonDimensionNumbers | optax.MaskedNode)


def _match(config: ConfigDict, params: Tree) -> Tree:
    """The `_Rule` of every parameter."""
    known = [field.name for field in dataclasses.fields(_Rule)]
    rules = []
    for pattern, options in config.rules:
        for name in options:
            if name not in known:
                raise UserError(
                    f'config.optim.rules: "{name}" of "{pattern}" is unknown{nearest(name, known)}'
                )
        rules.append((pattern, _Rule(**options)))
    return trees.match_rules(rules, params, "config.optim.rules")


def split(config: ConfigDict, params: Tree) -> tuple[Tree, Tree]:
    """The parameters that are trained, and those that `config.rules` freeze.

    `trees.join` makes one tree of them again.

    Raises:
        UserError: wrong rules, see `make`, or none is left to be trained.
    """
    still = jax.tree.map(lambda rule: rule.freeze, _match(config, params))
    frozen, trained = trees.split(params, still)
    if not trained:
        raise UserError("config.optim.rules freeze every parameter: there is nothing to train")
    return trained, frozen


def make(config: ConfigDict, params: Tree, total_steps: int) -> optax.GradientTransformation:
    """Clipping, AdamW, or Muon where a rule asks for it, and the schedule; for what is trained.

    Args:
        config: what `schedule` reads; `b1`, `b2`, `eps`; `clip`, the largest global norm of the
            gradients, 0 for no limit; `weight_decay`; `mu_dtype` and `nu_dtype`, the dtypes that
            Adam's moments (and Muon's one, the first of them) are kept in; `rules`, (regex,
            options) pairs over the parameters' paths, first match wins, see `_Rule`.
        params: all parameters, abstract or not: those that are frozen too.
        total_steps: steps of the run.

    Raises:
        UserError: a parameter without a rule, a rule without a parameter, an unknown option, an
            impossible schedule.
    """
    rules, _ = split(config, _match(config, params))
    params, _ = split(config, params)
    names = trees.paths(params)

    def check(rule: _Rule, name: str, param: Any) -> None:
        wanted = tuple(range(min(rule.muon, default=0), param.ndim - 1))[: len(rule.muon)]
        if rule.muon != wanted:
            raise UserError(
                f"config.optim.rules: muon={rule.muon} of {name} {list(param.shape)}: name dims in "
                "a row, with at least one behind them"
            )

    jax.tree.map(check, rules, names, params)
    # A placeholder, not None, where Adam is to update: None would be no leaf.
    matrices = jax.tree.map(
        lambda rule, p: rule.matrix(p.ndim) or optax.MaskedNode(), rules, params
    )
    muon = jax.tree.map(_is_matrix, matrices, is_leaf=_is_entry)
    adam = jax.tree.map(lambda is_muon: not is_muon, muon)

    def decay_and_scale(updates: Tree, params: Tree) -> Tree:
        def leaf(matrix: Any, rule: _Rule, update: jax.Array, param: jax.Array) -> jax.Array:
            if _is_matrix(matrix):
                sides = (matrix.reduction_axis, matrix.output_axis)
                larger = max(math.prod(param.shape[d] for d in side) for side in sides)
                update *= 0.2 * math.sqrt(larger)
            return (update + config.weight_decay * rule.decay * param) * rule.lr_scale

        return jax.tree.map(leaf, matrices, rules, updates, params, is_leaf=_is_entry)

    by_muon = optax.identity()
    if any(jax.tree.leaves(muon)):
        by_muon = optax.masked(
            scale_by_muon(mu_dtype=config.mu_dtype, weight_dimension_numbers=matrices), muon
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.masked(_scale_by_adam(config), adam),
        by_muon,
        optax.stateless(decay_and_scale),
        optax.scale_by_learning_rate(schedule(config, total_steps)),
    )


def _scale_by_adam(config: ConfigDict) -> optax.GradientTransformation:
    """Adam that keeps its second moment in a dtype of the config; it computes in float32."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)
    # Configs stored before there was one know no `nu_dtype`.
    dtype = jnp.dtype(config.get("nu_dtype", "float32"))
    # A change of less than half a unit in the last place would be rounded away, step after step.
    least = jnp.finfo(dtype).eps
    if 1 - config.b2 < 2 * least:
        raise UserError(
            f"config.optim.nu_dtype is {dtype}, which keeps changes of {float(least):g} and more: "
            f"with config.optim.b2={config.b2} the second moment would stand still; set it to "
            f"{1 - 2 * float(least):g} or less, or keep the moment in float32"
        )

    def kept(state: optax.ScaleByAdamState, dtype: Any) -> optax.ScaleByAdamState:
        return state._replace(nu=optax.tree.cast(state.nu, dtype))

    def init(params: Tree) -> optax.ScaleByAdamState:
        return kept(adam.init(params), dtype)

    def update(
        updates: Tree, state: optax.ScaleByAdamState, params: Tree | None = None
    ) -> tuple[Tree, optax.ScaleByAdamState]:
        updates, state = adam.update(updates, kept(state, jnp.float32), params)
        return updates, kept(state, dtype)

    return optax.GradientTransformation(init, update)


def ema_update(
    ema: Tree, params: Tree, step: Int[Array, ""] | int, decay: float, warmup: bool
) -> Tree:
    """Moves the average of the weights: `decay * ema + (1 - decay) * params`.

    Args:
        step: steps done before this one.
        warmup: use min(decay, (1 + step) / (10 + step)), so that the average of a short run does
            not remember its initialisation (TensorFlow's ExponentialMovingAverage).
    """
    if warmup:
        decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(params, ema, 1 - decay)
