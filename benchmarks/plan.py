"""The training step as the TPU compiler sees it, beside MaxText's: docs/benchmark_plan.md.

    pip install libtpu==0.0.52
    unifluid benchmark plan

First the same work as MaxText 0.2.5's: Gemma-2 2B, 8 x 512 tokens a device, AdamW, float32 state,
bfloat16 compute, a loss on the next token at every position. Its figures, with the layouts that
served it best, were taken with the versions in `PEER`; only equal ones compare, and the page says
where ours differ. Then, from the plans of the recipes (`unifluid benchmark plans`), where the time
of our own step goes. All are estimates of the compiler, no measurements. A compilation takes
minutes; with `--only` the figures of the other cases are kept.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import flags
from ml_collections import ConfigDict

from unifluid_jax import cli, flops, hlo, losses, optim, planning, sharding, topology
from unifluid_jax.errors import UserError
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.kernels import Packed
from unifluid_jax.models.presets import preset

_OUT = flags.DEFINE_string("out", "docs/benchmark_plan", "Where to write: .md, .json.")
_ONLY = flags.DEFINE_string("only", "", "Compile only for topologies whose name contains this.")

ROWS, LENGTH, VOCABULARY = 8, 512, 256_128
# What MaxText counts: 6 N a token, N with the tied table once, and causal attention.
PARAMETERS = 2.6146e9
# What its figures were taken with.
PEER = {"jax": "0.12.0.1", "libtpu": "0.0.52"}


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
    Case("v6e:16x16", (16, 16, 1), "qkv", 256, 0.176, (1.96 + 5.98) * 1e9),
)
_PLANS = Path("docs/plans.json")  # of `unifluid benchmark plans`
RECIPES = ("unifluid_2b v5e_64", "unifluid_2b v5p_128")


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
    timed = planning.times(cost, chip, kernel, model)
    memory = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    return {
        "versions": planning.versions(),
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
    out = Path(_OUT.value)
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}")
    print(run(_ONLY.value, out, _PLANS))


def run(only: str, out: Path, recipes: Path) -> str:
    """Compiles the cases whose name contains `only`; writes and returns the page of all."""
    file = out.with_suffix(".json")
    kept = json.loads(file.read_text()) if file.exists() else {}
    for case in CASES:
        if only in case.name:
            print(f"{case.name}: compiling", flush=True)
            kept[case.name] = against_peer(case)
            file.write_text(json.dumps(kept, indent=1) + "\n")
    made = json.loads(recipes.read_text()) if recipes.exists() else {}
    text = page(kept, {name: made[name] for name in RECIPES if name in made})
    out.with_suffix(".md").write_text(text)
    return text


def page(text: dict[str, Any], recipes: dict[str, Any]) -> str:
    """The page: figures of the text step by topology, and plans of recipes by name."""
    lines = [
        "# The training step beside MaxText's",
        "",
        "Made by `unifluid benchmark plan`. **Estimates of the TPU compiler, not measurements.**",
        "",
        f"Gemma-2 2B, {ROWS} x {LENGTH} tokens a device, a loss at every position. Compute is the"
        " compiler's cycles at the chip's clock; attention kernels and collectives, which it does"
        " not count, are in the step: kernels at 40 % of peak, collectives at nominal link rates."
        " MFU counts 6 N tokens and causal attention.",
        "",
        "| topology | data x fsdp x tensor | remat | compute s | MaxText 0.2.5 | ratio"
        " | memory GB | MaxText 0.2.5 | step s | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in text.items():
        timed = row["estimate"]
        cells = (
            name,
            " x ".join(map(str, row["mesh"].values())),
            row["remat"],
            f"{row['cycles_s']:.3f}",
            f"{row['peer_cycles_s']:.3f}",
            f"**{row['ratio']:.3f}**",
            f"{row['memory_gb']:.2f}",
            f"{row['peer_memory_gb']:.2f}",
            "-".join(f"{t:.3f}" for t in timed["step_s"]),
            "-".join(f"{x:.3f}" for x in timed["mfu"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"MaxText's were compiled with {_said(PEER)}."]
    for name, row in text.items():
        same = all(row["versions"].get(package) == version for package, version in PEER.items())
        note = "" if same else ": **not the same**"
        lines.append(f"Ours for {name}: {_said(row['versions'])}{note}.")
    lines += [
        "",
        "## The recipe's own step",
        "",
        "Where its time goes, in seconds of the whole step, all rows of the paper's batch:",
        "",
        f"| | {' | '.join(recipes)} |",
        f"|---|{'---|' * len(recipes)}",
    ]
    shares = [bounds(plan) for plan in recipes.values()]
    for part in dict.fromkeys(part for found in shares for part in found):
        lines.append(f"| {part} | {' | '.join(found[part] for found in shares)} |")
    made = {_said(plan["versions"]) for plan in recipes.values()}
    lines += ["", f"Compiled with {'; '.join(sorted(made))}."] if made else []
    return "\n".join(lines) + "\n"


def bounds(plan: dict[str, Any]) -> dict[str, str]:
    """What a step's time is made of, with the share of it."""
    timed, chip = plan["estimate"], topology.CHIPS[plan["topology"].split(":")[0]]
    model, issued = planning.flops_of(plan)
    low, high = timed["step_s"]
    seconds = {
        "the model's FLOPs at peak": model / chip.flops,
        "matrix products issued beyond them (recomputed layers)": (issued - model) / chip.flops,
        "compute besides: products below peak, elementwise work": timed["cycles_s"]
        - issued / chip.flops,
        "attention kernels": timed["kernels_s"],
        "collectives that nothing runs beside": timed["collectives_sync_s"],
    }
    found = {part: f"{s:.3f} ({s / low:.0%})" for part, s in seconds.items()}
    found["step, asynchronous collectives hidden"] = f"{low:.3f}"
    found["step, none of them hidden"] = f"{high:.3f}"
    found["MFU"] = "-".join(f"{x:.3f}" for x in timed["mfu"])
    return found


def _said(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    cli.run(main)
