"""Trains a model, or goes on where its workdir stopped.

    unifluid train --config=experiments/quickstart.py --workdir=runs/quickstart
    unifluid train --config=experiments/quickstart.py:debug --workdir=runs/debug

One page, top to bottom. The step is a pure function (state, batch) -> (state, scalars) (step.py);
what is trained, a UniFluid or an image tokenizer, is a `Task` (tasks.py).

Where the first state comes from, first match wins:
    1. the last finished checkpoint of the workdir: state and input, bit for bit where it stopped
    2. fresh parameters from `config.seed`
"""

from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from unifluid_jax import checkpoint, cli, evals, metrics, sharding, tasks, topology
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError
from unifluid_jax.step import State, describe, init, train_step

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run in it goes on.", required=True
)


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
    optimizer, abstract = describe(config, task, mesh)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    process, processes = jax.process_index(), jax.process_count()
    batches = task.batches(process, processes)

    with checkpoint.Checkpointer(workdir, keep=config.train.keep) as checkpoints:
        if checkpoints.latest_step() is not None:
            restored = checkpoints.restore(abstract)
            state, first = restored.state, restored.step
            batches.set_state(restored.iterator)
        else:
            key = jax.random.key(config.seed)
            state = jax.jit(lambda key: init(task, optimizer, key), out_shardings=where)(key)
            first = 0
        meta = {"config": configs.to_json(config)}
        checkpoint.claim(workdir, config)

        step_fn = jax.jit(
            lambda state, batch: train_step(config, task, optimizer, state, batch),
            donate_argnums=0,
            out_shardings=(where, sharding.replicated(mesh)),
            compiler_options=topology.compiler_options(jax.default_backend()),
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


if __name__ == "__main__":
    cli.run(main)
