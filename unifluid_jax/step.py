"""The training step: a pure function (state, batch) -> (state, scalars).

The state is a dict of pytrees: `step`; `params`, the parameters that are trained, their average
`ema` and their `opt_state`; `frozen`, the parameters that are not. What else the loss reads, the
task's `constants`, belongs to no state. `train` runs the step, `plan` compiles it for chips that
are not there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from unifluid_jax import optim, sharding, tasks, trees

State = dict[str, Any]


def describe(
    config: ConfigDict, task: tasks.Task, mesh: jax.sharding.Mesh
) -> tuple[optax.GradientTransformation, State]:
    """The optimizer, and the state as `jax.ShapeDtypeStruct`s with shardings."""
    key = jax.random.key(config.seed)
    params = jax.eval_shape(task.model.init, key)
    optimizer = optim.make(config.optim, params, config.train.steps)
    placed = sharding.shardings(task.model.axes, params, mesh)
    shapes = jax.eval_shape(lambda key: init(config, task, optimizer, key), key)
    return optimizer, sharding.abstract(shapes, sharding.state_shardings(shapes, placed, mesh))


def describe_constants(task: tasks.Task, mesh: jax.sharding.Mesh) -> Any:
    """The task's constants as `jax.ShapeDtypeStruct`s with shardings."""
    return sharding.abstract(
        task.constants, sharding.shardings(task.constant_axes, task.constants, mesh)
    )


def init(
    config: ConfigDict,
    task: tasks.Task,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    given: Any = None,
) -> State:
    """The state before the first step; to be traced.

    Args:
        given: subtrees of the parameters that are not to be fresh.
    """
    params, frozen = optim.split(config.optim, {**task.model.init(key), **(given or {})})
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "frozen": frozen,
        "ema": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
    }


def row_keys(config: ConfigDict, step: jax.Array, rows: int) -> jax.Array:
    """The keys that the rows of a step draw their noise from."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def donated() -> tuple[int, ...]:
    """Which arguments a jitted step (state, batch, ...) overwrites: the state, but not on CPUs.

    There parameters and moments are read by two loops each, of which the first would overwrite what
    the second reads: XLA copies them all beforehand. Two states then take less time than one, half
    of it in small steps; where memory is short, on accelerators, one loop does both.
    """
    return () if jax.default_backend() == "cpu" else (0,)


def train_step(
    config: ConfigDict,
    task: tasks.Task,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: dict[str, jax.Array],
    constants: Any,
) -> tuple[State, dict[str, jax.Array]]:
    """One update of parameters, moments and EMA; to be traced.

    Args:
        batch: arrays whose first dimension is the rows of the global batch.
        constants: of the task, as `describe_constants` says.

    Returns:
        The next state, and scalars: those of the task's loss, `grad_norm` before clipping, `lr`,
        and `skipped`: loss or gradients were not finite, and only `step` has moved.
    """
    rows = len(jax.tree.leaves(batch)[0])
    parts = config.train.accumulate
    key_B = row_keys(config, state["step"], rows)
    total = task.totals(batch)

    def loss(params, batch, key_B):
        return task.loss(trees.join(params, state["frozen"]), constants, batch, key_B, total)

    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        grads, scalars = gradient(state["params"], batch, key_B)
    else:
        # Part i takes rows i, i + parts, ...: every device keeps its share of each part.
        cut = jax.tree.map(
            lambda x: x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1), (batch, key_B)
        )

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, gradient(state["params"], *part)), None

        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, state["params"], *jax.tree.map(lambda x: x[0], cut)),
        )
        (grads, scalars), _ = jax.lax.scan(add, zeros, cut)

    norm = optax.tree.norm(grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
    ema = optim.ema_update(
        state["ema"], params, state["step"], config.train.ema_decay, config.train.ema_warmup
    )
    # One bad batch must not be the end: nothing of it may stay (nonfinite.py counts them).
    finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(norm)
    after = {"params": params, "ema": ema, "opt_state": opt_state}
    before = {name: state[name] for name in after}
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    scalars |= {
        "grad_norm": norm,
        "lr": optim.schedule(config.optim, config.train.steps)(state["step"]),
        "skipped": ~finite,
    }
    return {"step": state["step"] + 1, **after, "frozen": state["frozen"]}, scalars
