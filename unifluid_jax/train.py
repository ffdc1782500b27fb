"""Trains a model, or goes on where its workdir stopped.

    unifluid train --config=experiments/quickstart.py --workdir=runs/quickstart
    unifluid train --config=experiments/quickstart.py:debug --workdir=runs/debug

One page, top to bottom. The step is a pure function (state, batch) -> (state, scalars); the state
is a dict of pytrees: `step`; `params`, the parameters that are trained, their average `ema` and
their `opt_state`; `frozen`, the parameters that are not. What is trained, a UniFluid or an image
tokenizer, is a `Task` (tasks.py).

Where the first state comes from, first match wins:
    1. the last whole checkpoint of the workdir: state and input, bit for bit where it stopped
    2. the parameters of `config.init_from`, a checkpoint (of `unifluid convert`, or of another run:
       its averages) or an exported UniFluid; adapters of LoRA are fresh
    3. fresh parameters from `config.seed`

SIGTERM saves and ends with exit code 75: give the same command again (docs/running.md).
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict

from unifluid_jax import (
    checkpoint,
    cli,
    distributed,
    evals,
    lora,
    metrics,
    nonfinite,
    observe,
    optim,
    preemption,
    replay,
    resume,
    sharding,
    tasks,
    trees,
    watchdog,
)
from unifluid_jax import config as configs
from unifluid_jax.errors import Restart, UserError
from unifluid_jax.evals.base import EvalConfig
from unifluid_jax.interop import unifluid
from unifluid_jax.models.functional import Params

_CONFIG = cli.config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a run in it goes on.", required=True
)
_PROFILE = flags.DEFINE_string(
    "profile", None, "Steps to profile, like 100:105, into WORKDIR/profile (for XProf)."
)
_DUMP = flags.DEFINE_bool(
    "dump_step", False, "Write jaxpr, StableHLO and compiled HLO of the step to WORKDIR/program."
)
_REPLAY = flags.DEFINE_integer(
    "replay", None, "Train nothing; tell what was not finite in this step, whose batch was kept."
)
_MULTIHOST = flags.DEFINE_bool(
    "multihost", False, "Join the other processes of a TPU slice, Slurm, GKE or Open MPI job."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Join others by hand: HOST:PORT of process 0 (JAX_COORDINATOR_ADDRESS)."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Their number (JAX_NUM_PROCESSES).")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is (JAX_PROCESS_ID).")
_WAIT = flags.DEFINE_integer("wait_seconds", 300, "How long processes wait for a missing one.")

State = dict[str, Any]


def main(argv: list[str]) -> None:
    cli.positional(argv)
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    profile = observe.profile_window(_PROFILE.value)
    distributed.start(
        *(workdir, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value),
        *(_MULTIHOST.value, _WAIT.value),
    )
    if _REPLAY.value is not None:
        print(*replay.replay(config, workdir, _REPLAY.value, describe, train_step), sep="\n")
        return
    train(config, workdir, profile, _DUMP.value, _WAIT.value)


def train(
    config: ConfigDict,
    workdir: Path,
    profile: range = range(0),
    dump: bool = False,
    wait: int | float = 300,
) -> State:
    """Runs `config.train.steps` steps, less those that the workdir has behind it.

    Args:
        profile: steps to profile.
        dump: whether to write the step's program to the workdir.
        wait: seconds that processes wait for each other before the first step.

    Returns:
        The last state.

    Raises:
        UserError: the config does not fit itself, its data, or the run that is in the workdir; the
            disk is full; too many steps were not finite.
        Restart: SIGTERM has come, and the state is saved.
    """
    # All that can be refused is refused here, before anything is written or compiled.
    c, task = config.train, tasks.make(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.input.batch_size, c.accumulate, mesh)
    least = dict.fromkeys(("steps", "log_every", "checkpoint_every", "keep"), 1)
    least |= dict.fromkeys(("keep_every", "max_skipped", "hang_seconds", "hang_exit_seconds"), 0)
    for name, value in least.items():
        if c[name] < value:
            raise UserError(f"config.train.{name} is {c[name]}: set it to {value} or more")
    evaluations = evals.check(config)
    evals.check_best(c.keep_best, evaluations)
    resume.check_workdir(workdir, config)

    # The whole state is described first and then built in its place: no device ever holds more
    # than its share.
    optimizer, abstract = describe(config, task, mesh)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    rows = sharding.local_rows(mesh, config.input.batch_size)
    batches = task.batches(rows)
    distributed.barrier("the first step", wait)

    with (
        checkpoint.Checkpointer(workdir, c.keep, c.keep_every, c.keep_best) as checkpoints,
        watchdog.Watchdog(
            workdir, jax.process_index(), c.hang_seconds, c.hang_exit_seconds
        ) as watching,
        preemption.Notice() as notice,
        distributed.peers(),
    ):
        first, productive = 0, 0.0
        if checkpoints.latest_step() is not None:
            watching.enter("restore")
            restored = checkpoints.restore(abstract)
            state, first = restored.state, restored.step
            productive = restored.meta["productive"]
            batches.set_state(restored.iterator)
        else:
            watching.enter("init")
            given = {}
            if config.init_from:
                wanted = trees.join(abstract["params"], abstract["frozen"])
                given = pretrained(config.init_from, wanted)
            begin = jax.jit(
                lambda key, given: fresh(config, optimizer, {**task.model.init(key), **given}),
                donate_argnums=1,
                out_shardings=where,
            )
            state = begin(jax.random.key(config.seed), given)
            del given
        resume.claim(workdir, config)
        meter = metrics.Meter(watching.enter, productive, metrics.log_start(workdir, first))
        guard = nonfinite.Guard(workdir, c.max_skipped, rows)
        profiler = observe.Profiler(workdir / "profile", profile)

        def observed_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict]:
            stop = batch.pop("stop")
            state, scalars = train_step(config, task, optimizer, state, batch)
            return state, {"scalars": scalars, "counts": task.count(batch), "stop": stop.any()}

        step_fn = observe.Program(
            jax.jit(
                observed_step, donate_argnums=0, out_shardings=(where, sharding.replicated(mesh))
            ),
            "step",
            workdir / "program" if dump else None,
            compiling=lambda: meter.phase("compile"),
        )
        with (
            metrics.Writer(workdir, start_step=first) as writer,
            metrics.Progress(c.steps, first, "training") as progress,
            # Only explicit transfers: an accidental copy between host and devices would stall
            # every step.
            jax.transfer_guard("disallow"),
        ):

            def report(step: int, batch: dict[str, np.ndarray], out: dict[str, Any]) -> bool:
                """Whether to stop."""
                # Waits for the step: the host stays one step ahead of the devices and no more.
                out = jax.device_get(out)
                profiler.done(step)
                counts = {name: int(n) for name, n in out["counts"].items()}
                scalars, speeds = out["scalars"], meter.read(counts)
                losses = {name: x for name, x in scalars.items() if name.startswith("loss")}
                progress.update(step, losses, speeds)
                if step % c.log_every == 0 or step == c.steps:
                    times = meter.shares() | {"time/compile_seconds": step_fn.seconds}
                    writer.scalars(step, scalars | speeds | times | observe.memory())
                guard.check(step, bool(scalars["skipped"]), batch)
                return bool(out["stop"])

            def evaluate(step: int, due: dict[str, EvalConfig]) -> None:
                with meter.phase("evaluate", step), jax.transfer_guard("allow"):
                    params = trees.join(state["ema"], state["frozen"])
                    subject = task.subject(distributed.local(params))
                    scores, pictures = evals.run(config, subject, due)
                writer.scalars(step, scores)
                writer.images(step, pictures)
                checkpoints.score(step, scores)

            # A run that ended between a save and its evaluation owes it.
            owed = evals.due(evaluations, first, c.steps) if first else {}
            if owed and not checkpoints.scored(first):
                evaluate(first, owed)
            pending, stop = None, False
            for step in range(first + 1, c.steps + 1):
                with meter.phase("input", step):
                    batch = next(batches)
                asked = np.full(len(rows), notice.requested)
                with profiler.step(step):
                    placed = sharding.shard_batch({**batch, "stop": asked}, mesh)
                    state, out = step_fn(state, placed)
                # The step just sent off runs while the host reads the metrics of the one before.
                if pending is not None:
                    stop = report(*pending)
                pending = (step, batch, out)
                checkpoints.check()
                due = evals.due(evaluations, step, c.steps)
                if due or stop or step % c.checkpoint_every == 0 or step == c.steps:
                    stop = report(*pending) or stop
                    pending = None
                    with meter.phase("checkpoint", step):
                        # The iterator's state belongs to this step: it is taken before the next
                        # batch is drawn.
                        meta = {
                            "config": configs.to_json(config),
                            "productive": meter.productive(),
                        }
                        checkpoints.save(step, state, batches.get_state(), meta)
                    if stop:
                        with meter.phase("checkpoint", step):
                            checkpoints.wait()
                        raise Restart(f"SIGTERM has come; step {step} of {c.steps} is saved")
                    if due:
                        evaluate(step, due)
            profiler.close()
            with meter.phase("checkpoint"):
                checkpoints.wait()
    return state


def describe(
    config: ConfigDict, task: tasks.Task, mesh: jax.sharding.Mesh
) -> tuple[optax.GradientTransformation, State]:
    """The optimizer, and the state as `jax.ShapeDtypeStruct`s with shardings."""
    params = jax.eval_shape(task.model.init, jax.random.key(config.seed))
    optimizer = optim.make(config.optim, params, config.train.steps)
    placed = sharding.shardings(task.model.axes, params, mesh)
    shapes = jax.eval_shape(lambda params: fresh(config, optimizer, params), params)
    return optimizer, sharding.abstract(shapes, sharding.state_shardings(shapes, placed, mesh))


def pretrained(path: str, params: Params) -> Params:
    """The parameters of a checkpoint or an exported model, straight onto their devices.

    Args:
        params: all that are wanted, as `jax.ShapeDtypeStruct`s with shardings.

    Returns:
        All but LoRA's adapters.

    Raises:
        UserError: there are none at that path, or they are damaged or of another model.
    """
    params = lora.base(params)
    if unifluid.is_folder(Path(path)):
        return unifluid.read_params(Path(path), params)
    return checkpoint.restore_params(path, params, "ema")


def fresh(config: ConfigDict, optimizer: optax.GradientTransformation, params: Params) -> State:
    """The state before the first step, from all parameters; to be traced."""
    params, frozen = optim.split(config.optim, params)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "frozen": frozen,
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
        The next state, and scalars: those of the task's loss, `grad_norm` before clipping, `lr`,
        and `skipped`: loss or gradients were not finite, and only `step` has moved.
    """
    rows = len(jax.tree.leaves(batch)[0])
    parts = config.train.accumulate
    key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    total = task.totals(batch)

    def loss(params, batch, key_B):
        return task.loss(trees.join(params, state["frozen"]), batch, key_B, total)

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

    updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    norm = optax.tree.norm(grads)
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


if __name__ == "__main__":
    cli.run(main)
