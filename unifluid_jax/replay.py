"""Does a step again whose loss or gradients were not finite, and says where that begins.

    unifluid train --config=runs/mine/config.json --workdir=runs/mine --replay=123

Goes from the last checkpoint before the step to the step as the run did, takes the batch that the
run kept of it, and tells what is not finite in parameters, batch, loss and gradients, and the first
operation that makes such a number. Not while the run goes on: unfinished checkpoints are removed.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from unifluid_jax import checkpoint, nonfinite, sharding, tasks, topology, trees
from unifluid_jax.errors import UserError
from unifluid_jax.step import describe, describe_constants, donated, row_keys, train_step


def replay(config: ConfigDict, workdir: Path, step: int) -> list[str]:
    """What is not finite in a step, in lines to be read.

    Raises:
        UserError: the batch of the step was not kept, or no checkpoint before it is left.
    """
    kept = nonfinite.load(workdir, step)
    before = [saved for saved in checkpoint.saved_steps(workdir) if saved < step]
    if not before:
        raise UserError(f"no checkpoint before step {step} is left in {workdir}")
    task, mesh = tasks.make(config), sharding.make_mesh(config.mesh)
    optimizer, abstract = describe(config, task, mesh)
    constants = sharding.put(task.constants, describe_constants(task, mesh))
    with checkpoint.Checkpointer(workdir, config.train.keep) as checkpoints:
        restored = checkpoints.restore(abstract, before[-1])
    batches = task.batches()
    batches.set_state(restored.iterator)
    step_fn = jax.jit(
        lambda *arguments: train_step(config, task, optimizer, *arguments),
        donate_argnums=donated(),
        compiler_options=topology.compiler_options(jax.default_backend()),
    )
    state = restored.state
    for _ in range(restored.step + 1, step):
        with jax.set_mesh(mesh):
            state, _ = step_fn(state, sharding.shard_batch(next(batches), mesh), constants)
    drawn = next(batches)
    changed = [name for name in drawn if not np.array_equal(drawn[name], kept.get(name))]

    lines = [f"step {step}, {step - restored.step} after the checkpoint of step {restored.step}"]
    if changed:
        lines.append(f"the input gives another batch today: {', '.join(changed)} differ")
    whole = trees.join(state["params"], state["frozen"])
    lines += _listed("parameters", whole) + _listed("the batch", kept)
    batch = sharding.shard_batch(kept, mesh)
    key_B = row_keys(config, state["step"], len(jax.tree.leaves(batch)[0]))

    @jax.jit
    def gradient(params: Any, frozen: Any) -> Any:
        def loss(params: Any) -> Any:
            whole = trees.join(params, frozen)
            return task.loss(whole, constants, batch, key_B, task.totals(batch))

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, scalars), grads = gradient(state["params"], state["frozen"])
    lines += [f"{name} = {float(x):.6g}" for name, x in scalars.items()]
    lines += _listed("gradients", grads)
    try:
        with jax.debug_nans(True), jax.debug_infs(True):
            gradient(state["params"], state["frozen"])
        lines.append("no operation made a NaN or an infinity")
    except FloatingPointError as error:
        lines.append("first: " + " ".join(str(error).split("\n")[0].split()))
        lines += _origin(error)
    return lines


def _listed(what: str, tree: Any) -> list[str]:
    """Which leaves of a tree have numbers that are not finite, and how many."""
    found = []
    for name, leaf in trees.flatten(tree).items():
        values = np.asarray(jax.device_get(leaf))
        if values.dtype.kind == "f" or values.dtype.name == "bfloat16":
            bad = np.count_nonzero(~np.isfinite(values.astype(np.float32)))
            if bad:
                found.append(f"  {name}: {bad} of {values.size}")
    return [f"{what}: {'not finite' if found else 'all finite'}", *found]


def _origin(error: BaseException) -> list[str]:
    """The lines of this code that led to an error, the innermost last."""
    found, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "unifluid_jax" in code.co_filename:
            found.append(f"  {Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return found[-5:]
