"""Exports a trained model as a folder of its own, for use without the run that made it.

    unifluid export --workdir=runs/quickstart --out=models/mine
    unifluid sample generate --workdir=models/mine --prompt="a red circle"

The folder holds the weights (model.safetensors), the config, both tokenizers and a model card with
the scores that `unifluid evaluate` found for this step. `unifluid_jax.load` takes it as it takes a
run.
"""

import json
from pathlib import Path
from typing import Any

import jax
import rich.console
from absl import flags
from ml_collections import ConfigDict

from unifluid_jax import checkpoint, cli, pretrained
from unifluid_jax.input import pipeline
from unifluid_jax.parts import assemble

_WORKDIR = flags.DEFINE_string("workdir", None, "Run to export from.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint, by default the latest.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged weights or raw ones.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.", required=True)
_DTYPE = flags.DEFINE_enum("dtype", "float16", list(pretrained.DTYPES), "Of the weights.")
_CONFIG = cli.config_flag(stored=lambda: checkpoint.stored_config(_WORKDIR.value, _STEP.value))


def main(argv: list[str]) -> None:
    cli.positional(argv)
    config, out = _CONFIG.value, Path(_OUT.value)
    model = assemble(config).model
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    params = checkpoint.restore_params(_WORKDIR.value, abstract, _WEIGHTS.value, _STEP.value)
    _, step = checkpoint.locate(_WORKDIR.value, _STEP.value)
    file = Path(_WORKDIR.value) / "evals" / str(step) / "scores.json"
    scores = json.loads(file.read_text()) if file.is_file() else None
    pretrained.save(
        out,
        config,
        params,
        dtype=_DTYPE.value,
        about={"step": step, "weights": _WEIGHTS.value},
        card=card(out.name, config, params, step, scores),
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console = rich.console.Console(soft_wrap=True, highlight=False)
    console.print(f"step {step} in {out}, {size / 2**20:.1f} MiB")


def card(
    name: str, config: ConfigDict, params: Any, step: int, scores: dict[str, Any] | None
) -> str:
    """The model card.

    Args:
        scores: what `unifluid evaluate` wrote for these weights, if it has run.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    c = config.model
    data = sorted({entry["dataset"] for entry in pipeline.mixture(config)})
    tasks = sorted({entry["task"] for entry in config.input.mixture})
    lines = [
        f"# {name}",
        "",
        "A UniFluid: one autoregressive model that reads and draws, with continuous image tokens",
        "(unifluid_jax; the method is that of arXiv 2503.13436).",
        "",
        "```python",
        "import unifluid_jax",
        "",
        f'm = unifluid_jax.load("{name}")',
        'm.generate("a red circle", n=4)[0].save("circle.png")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {count:,} |",
        f"| backbone | {c.backbone.depth} layers of width {c.backbone.width} |",
        f"| diffusion head | {c.head.depth} blocks of width {c.head.width},"
        f" {config.diffusion.process} |",
        f"| trained for | {step:,} steps of {config.input.batch_size} packed rows of"
        f" {config.input.seq_len} positions |",
        f"| on | {', '.join(data)} |",
        f"| tasks | {', '.join(tasks)} |",
        "",
    ]
    if scores is not None:
        lines += ["| score | | examples |", "|---|---|---|"]
        for key, value in scores["scores"].items():
            lines.append(f"| {key} | {value:.3f} | {scores['examples'][key.split('/')[0]]} |")
        lines += ["", f"Measured with {json.dumps(scores['sampling'])}.", ""]
    lines += ["What the model makes is bound by the licences of its data: see their cards.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
