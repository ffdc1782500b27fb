"""Trains a model, or goes on where its workdir stopped.

    unifluid train --config=experiments/quickstart.py --workdir=runs/quickstart
    unifluid train --config=experiments/quickstart.py:debug --workdir=runs/debug

One page, top to bottom. The step is a pure function (state, batch) -> (state, scalars); the state
is a dict of pytrees: `step`, `params`, `ema` and `opt_state`. What is trained, a UniFluid or an
image tokenizer, is a `Task` (tasks.py).

Where the first state comes from, first match wins:
    1. the last finished checkpoint of the workdir: state and input, bit for bit where it stopped
    2. fresh parameters from `config.seed`
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from ml_collections import ConfigDict

from unifluid_jax import checkpoint, cli, evals, metrics, optim, sharding, tasks
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run in it goes on.", required=True
)

State = dict[str, Any]


def main(argv: list[str]) -> None:
    cli.positional(argv)
    train(_CONFIG.value, Path(_WORKDIR.value))


def train(config: ConfigDict, workdir: Path) -> State:
    """Runs `config.train.steps` steps, less those that the workdir has behind it.

    Returns:
        The last state.

    Raises:
        UserError: the config does not fit itself, its data, or the run that is in the workdir.
    """
    # All that can be refused is refused here, before anything is written or compiled.
    task = tasks.make(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.input.batch_size, config.train.accumulate, mesh)
    for name in ("steps", "log_every", "checkpoint_every", "keep"):
        if config.train[name] < 1:
            raise UserError(f"config.train.{name} is {config.train[name]}: set it to 1 or more")
    evals.check(config)
    checkpoint.check_workdir(workdir, config)

    # The whole state is described first and then built in its place: no device ever holds more
    # than its share.
    key = jax.random.key(config.seed)
    shapes = jax.eval_shape(task.model.init, key)
    optimizer = optim.make(config.optim, shapes, config.train.steps)
    shapes = jax.eval_shape(lambda key: init(task, optimizer, key), key)
    where = sharding.state_shardings(
        shapes, sharding.shardings(task.model.axes, shapes["params"], mesh), mesh
    )
    process, processes = jax.process_index(), jax.process_count()
    batches = task.batches(process, processes)

    with checkpoint.Checkpointer(workdir, keep=config.train.keep) as checkpoints:
        if checkpoints.latest_step() is not None:
            restored = checkpoints.restore(sharding.abstract(shapes, where))
            state, first = restored.state, restored.step
            batches.set_state(restored.iterator)
        else:
            state = jax.jit(lambda key: init(task, optimizer, key), out_shardings=where)(key)
            first = 0
        meta = {"config": configs.to_json(config)}
        checkpoint.claim(workdir, config)

        step_fn = jax.jit(
            lambda state, batch: train_step(config, task, optimizer, state, batch),
            donate_argnums=0,
            out_shardings=(where, sharding.replicated(mesh)),
        )
        meter = metrics.Meter()
        with (
            metrics.Writer(workdir, start_step=first) as writer,
            metrics.Progress(config.train.steps, first, "training") as progress,
            jax.set_mesh(mesh),  # by which the models say where values lie
            # Only explicit transfers: an accidental copy between host and devices would stall
            # every step.
            jax.transfer_guard("disallow"),
        ):

            def report(step: int, scalars: dict[str, jax.Array], speeds: dict[str, float]) -> None:
                # Waits for the step: the host stays one step ahead of the devices and no more.
                scalars = jax.device_get(scalars)
                losses = {name: x for name, x in scalars.items() if name.startswith("loss")}
                progress.update(step, losses, speeds)
                if step % config.train.log_every == 0 or step == config.train.steps:
                    writer.scalars(step, scalars | speeds)

            pending = None
            for step in range(first + 1, config.train.steps + 1):
                with meter.waiting():
                    batch = next(batches)
                state, scalars = step_fn(state, sharding.shard_batch(batch, mesh))
                # The step just sent off runs while the host reads the metrics of the one before.
                if pending is not None:
                    report(*pending)
                counts = {name: n * processes for name, n in task.count(batch).items()}
                pending = (step, scalars, meter.read(counts))
                due = evals.due(config.evals, step, config.train.steps)
                save = step % config.train.checkpoint_every == 0 or step == config.train.steps
                if due or save:
                    report(*pending)
                    pending = None
                with meter.aside():
                    if save:
                        # The iterator's state belongs to this step: it is taken before the next
                        # batch is drawn.
                        checkpoints.save(step, state, batches.get_state(), meta)
                    if due:
                        with jax.transfer_guard("allow"):
                            scores, pictures = evals.run(config, task.subject(state["ema"]), due)
                        writer.scalars(step, scores)
                        writer.images(step, pictures)
    return state


def init(task: tasks.Task, optimizer: optax.GradientTransformation, key: jax.Array) -> State:
    """The state before the first step; to be traced."""
    params = task.model.init(key)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.copy, params),
        "opt_state": optimizer.init(params),
    }


def train_step(
    config: ConfigDict,
    task: tasks.Task,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: dict[str, jax.Array],
) -> tuple[State, dict[str, jax.Array]]:
    """One update of parameters, moments and EMA; to be traced.

    Args:
        batch: arrays whose first dimension is the rows of the global batch.

    Returns:
        The next state, and scalars: those of the task's loss, `grad_norm` before clipping, `lr`.
    """
    rows = len(jax.tree.leaves(batch)[0])
    parts = config.train.accumulate
    key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    total = task.totals(batch)
    frozen = optim.frozen(config.optim, state["params"])

    def loss(params, batch, key_B):
        still = jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, frozen)
        return task.loss(still, batch, key_B, total)

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

    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
    scalars |= {
        "grad_norm": optax.global_norm(grads),
        "lr": optim.schedule(config.optim, config.train.steps)(state["step"]),
    }
    ema = optim.ema_update(
        state["ema"], params, state["step"], config.train.ema_decay, config.train.ema_warmup
    )
    step = state["step"] + 1
    return {"step": step, "params": params, "ema": ema, "opt_state": opt_state}, scalars


if __name__ == "__main__":
    cli.run(main)
