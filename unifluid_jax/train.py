"""Trains a model, or goes on where its workdir stopped.

    unifluid train --config=experiments/quickstart.py --workdir=runs/quickstart
    unifluid train --config=experiments/quickstart.py:debug --workdir=runs/debug

One page, top to bottom. The step is a pure function (state, batch) -> (state, scalars) (step.py);
what is trained, a UniFluid or an image tokenizer, is a `Task` (tasks.py).

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
import numpy as np
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
    preemption,
    replay,
    resume,
    sharding,
    tasks,
    topology,
    trees,
    watchdog,
)
from unifluid_jax import config as configs
from unifluid_jax.errors import Restart, UserError
from unifluid_jax.evals.base import EvalConfig
from unifluid_jax.interop import unifluid
from unifluid_jax.models.functional import Params
from unifluid_jax.pretrained import find
from unifluid_jax.step import State, describe, describe_constants, donated, init, train_step

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


def main(argv: list[str]) -> None:
    cli.positional(argv)
    config, workdir = _CONFIG.value, resume.folder(_WORKDIR.value)
    profile = observe.profile_window(_PROFILE.value)
    distributed.start(
        *(workdir, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value),
        *(_MULTIHOST.value, _WAIT.value),
    )
    if _REPLAY.value is not None:
        print(*replay.replay(config, workdir, _REPLAY.value), sep="\n")
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
    constants = sharding.put(task.constants, describe_constants(task, mesh))
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
                lambda key, given: init(config, task, optimizer, key, given),
                donate_argnums=1,
                out_shardings=where,
            )
            state = begin(jax.random.key(config.seed), given)
            del given
        resume.claim(workdir, config)
        meter = metrics.Meter(watching.enter, productive, metrics.log_start(workdir, first))
        work = task.model_flops(abstract["params"])
        peak = topology.peak(mesh.devices.flat[0].device_kind)
        guard = nonfinite.Guard(workdir, c.max_skipped, rows)
        profiler = observe.Profiler(workdir / "profile", profile)

        def observed_step(
            state: State, batch: dict[str, jax.Array], constants: Params
        ) -> tuple[State, dict]:
            stop = batch.pop("stop")
            state, scalars = train_step(config, task, optimizer, state, batch, constants)
            return state, {"scalars": scalars, "counts": task.count(batch), "stop": stop.any()}

        step_fn = observe.Program(
            jax.jit(
                observed_step,
                donate_argnums=donated(),
                out_shardings=(where, sharding.replicated(mesh)),
                compiler_options=topology.compiler_options(jax.default_backend()),
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
                if work:
                    counts["model_flops"] = work
                scalars, speeds = out["scalars"], meter.read(counts)
                if peak and "model_flops/s" in speeds:
                    speeds["mfu"] = speeds["model_flops/s"] / (peak * mesh.size)
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
                # By this mesh the models say where values lie inside the step.
                with profiler.step(step), jax.set_mesh(mesh):
                    placed = sharding.shard_batch({**batch, "stop": asked}, mesh)
                    state, out = step_fn(state, placed, constants)
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


def pretrained(path: str, params: Params) -> Params:
    """The parameters of a checkpoint or an exported model, straight onto their devices.

    Args:
        path: as for `inference.load`.
        params: all that are wanted, as `jax.ShapeDtypeStruct`s with shardings.

    Returns:
        All but LoRA's adapters.

    Raises:
        UserError: there are none at that path, or they are damaged or of another model.
    """
    params = lora.base(params)
    folder = find(path)
    if folder is not None:
        return unifluid.read_params(folder, params)
    return checkpoint.restore_params(path, params, "ema")


if __name__ == "__main__":
    cli.run(main)
