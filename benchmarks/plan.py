"""The training step as the TPU compiler sees it, beside MaxText's.

    unifluid benchmark plan --json=docs/benchmark_plan.json

First the same work as MaxText 0.2.5's: Gemma-2 2B, 8 x 512 tokens a device, AdamW, float32 state,
bfloat16 compute, a loss on the next token at every position. Its figures, with the layouts that
served it best, were taken with jax 0.12.0.1 and libtpu 0.0.52; only equal versions compare. Then
the step of our own recipe. All are estimates of the compiler, no measurements.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich.console
import rich.table
from absl import flags
from ml_collections import ConfigDict

from unifluid_jax import cli, flops, hlo, losses, optim, planning, sharding, topology
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.kernels import Packed
from unifluid_jax.models.presets import preset

_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")
_ONLY = flags.DEFINE_string("only", "", "Run only the cases whose name contains this.")

ROWS, LENGTH, VOCABULARY = 8, 512, 256_128
# What MaxText counts: 6 N a token, N with the tied table once, and causal attention.
PARAMETERS = 2.6146e9


@dataclasses.dataclass(frozen=True)
class Case:
    """Equal work on one topology.

    Attributes:
        mesh: data, fsdp, tensor.
        remat, chunk: ours; what layers keep, targets of a row whose logits are computed at once.
        cycles_s, memory: MaxText's compute in seconds, and its arguments and temporaries in bytes.
    """

    name: str
    mesh: tuple[int, int, int]
    remat: str
    chunk: int
    cycles_s: float
    memory: float


CASES = (
    Case("v5e:4x4", (1, 16, 1), "qkv", 64, 0.553, (1.96 + 5.18) * 1e9),
    Case("v6e:16x16", (16, 16, 1), "qkv", 64, 0.176, (1.96 + 5.98) * 1e9),
)
# The real step: recipe, arguments, topology.
RECIPES = (
    ("experiments/unifluid_2b.py:topology=v5e_64", "v5e:8x8"),
    ("experiments/unifluid_2b.py:topology=v5p_128", "v5p:4x4x4"),
)


def text_step(case: Case, devices: list[Any], **sizes: Any) -> tuple[Any, Any]:
    """The lowered step of a language model on packed text, and its mesh.

    Args:
        **sizes: of the decoder where they are to differ from Gemma-2 2B's.
    """
    mesh = sharding.make_mesh(ConfigDict(dict(zip(sharding.AXES, case.mesh, strict=True))), devices)
    fields = {"vocab_size": VOCABULARY, "dtype": "bfloat16", "remat": case.remat, **sizes}
    config = GemmaConfig(**preset("gemma2_2b", **fields))
    model = Functional(lambda rngs: Gemma(config, rngs=rngs))
    rules = ConfigDict(
        {
            **{
                "lr": 1e-4,
                "warmup_steps": 10,
                "decay": "none",
                "decay_steps": -1,
                "end_scale": 0.0,
            },
            **{"b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip": 1.0, "weight_decay": 0.1},
            **{"mu_dtype": "float32", "nu_dtype": "float32", "rules": ((".*", {}),)},
        }
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    optimizer = optim.make(rules, shapes, 1000)
    state = {"params": shapes, "opt_state": jax.eval_shape(optimizer.init, shapes)}
    placed = sharding.shardings(model.axes, shapes, mesh)
    where = sharding.state_shardings(state, placed, mesh)
    shape, rows = (ROWS * mesh.size, LENGTH), sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        for name in ("tokens", "position", "step", "segment")
    }

    def step(state, batch):
        def loss(params):
            bound = model.bind(params)
            x_BLD = sharding.over_replicas(bound.embed(batch["tokens"]))
            with jax.named_scope("backbone"):
                packed = Packed(batch["step"], batch["segment"])
                hidden_BLD, _ = bound(x_BLD, batch["position"], packed)
            target_BL = jnp.roll(batch["tokens"], -1, axis=1)
            weight_BL = jnp.full(shape, 1 / math.prod(shape))
            table_VD, cap = bound.embedding[...], config.final_cap
            return losses.text_loss(hidden_BLD, table_VD, target_BL, weight_BL, cap, case.chunk)[0]

        value, gradient = jax.value_and_grad(loss)(state["params"])
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(gradient, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": moments}, value

    with jax.set_mesh(mesh):
        out = (where, sharding.replicated(mesh))
        lowered = jax.jit(step, donate_argnums=0, out_shardings=out).lower(
            sharding.abstract(state, where), batch
        )
    return lowered, mesh


def against_peer(case: Case) -> dict[str, Any]:
    """Figures of the text step, ours and MaxText's."""
    chip, devices = topology.describe(case.name)
    lowered, mesh = text_step(case, devices)
    compiled = lowered.compile(topology.compiler_options("tpu"))
    stats = compiled.memory_analysis()
    cost = hlo.analyse(compiled.as_text(), mesh.shape, planning.PARTS)
    gemma = GemmaConfig(**preset("gemma2_2b", vocab_size=VOCABULARY))
    pairs = flops.attended(LENGTH) * gemma.heads * gemma.head_dim * gemma.depth
    model = ROWS * LENGTH * (6 * PARAMETERS + 12 * pairs)
    kernel = 4.0 * ROWS * LENGTH**2 * gemma.heads * gemma.head_dim
    timed = planning.times(cost, chip, kernel, model, set())
    memory = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    return {
        "topology": case.name,
        "mesh": dict(mesh.shape),
        "remat": case.remat,
        "cycles_s": timed["cycles_s"],
        "peer_cycles_s": case.cycles_s,
        "ratio": timed["cycles_s"] / case.cycles_s,
        "arguments_gb": stats.argument_size_in_bytes / 1e9,
        "temp_gb": stats.temp_size_in_bytes / 1e9,
        "memory_gb": memory / 1e9,
        "peer_memory_gb": case.memory / 1e9,
        "estimate": timed,
        "program": planning.program(cost),
    }


def main(argv: list[str]) -> None:
    cli.positional(argv)
    out = _JSON.value and Path(_JSON.value)
    if out and not out.parent.is_dir():
        raise UserError(f"--json: there is no folder {out.parent}")
    found = run(_ONLY.value)
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")


def run(only: str) -> dict[str, Any]:
    """Prints the tables of the cases whose name contains `only`; returns their figures."""
    console = rich.console.Console(width=120)
    found: dict[str, Any] = {"text": [], "unifluid": []}
    table = rich.table.Table(title="Gemma-2 2B, 8 x 512 tokens a device, loss at every position")
    for column in (
        *("topology", "compute s", "MaxText", "ratio", "memory GB", "MaxText", "step s", "MFU"),
    ):
        table.add_column(column)
    for case in CASES:
        if only in f"text {case.name}":
            row = against_peer(case)
            found["text"].append(row)
            timed = row["estimate"]
            table.add_row(
                row["topology"],
                f"{row['cycles_s']:.3f}",
                f"{row['peer_cycles_s']:.3f}",
                f"{row['ratio']:.3f}",
                f"{row['memory_gb']:.2f}",
                f"{row['peer_memory_gb']:.2f}",
                "-".join(f"{t:.3f}" for t in timed["step_s"]),
                "-".join(f"{100 * x:.1f}" for x in timed["mfu"]) + " %",
            )
    if found["text"]:
        console.print(table)
    for path, name in RECIPES:
        if only in f"unifluid {name}":
            row = planning.make(configs.load(path), name)
            found["unifluid"].append({"config": path, **row})
            console.print(f"\n{path}: {planning.heading(row)}", soft_wrap=True)
            for part in planning.tables(row):
                console.print(part)
            for line in planning.remarks(row):
                console.print(line, soft_wrap=True)
    return found


if __name__ == "__main__":
    cli.run(main)
