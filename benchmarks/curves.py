"""Draws the losses of a run over its steps.

pip install -e '.[docs]'
python -m benchmarks.curves --workdir=runs/quickstart --out=docs/quickstart_curves.png
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from unifluid_jax import cli
from unifluid_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Run to draw.", required=True)
_OUT = flags.DEFINE_string("out", None, "PNG to write.", required=True)

# What to draw, if the run has it: the title and unit of each.
_PANELS = {
    "loss_text": "L_text, nats a token",
    "loss_visual": "L_visual, squared error a dim",
    "accuracy_text": "supervised text tokens right",
}


def main(argv: list[str]) -> None:
    cli.positional(argv)
    file = Path(_WORKDIR.value) / "metrics.jsonl"
    if not file.exists():
        raise UserError(f"no metrics in {_WORKDIR.value}: give the workdir of a training run")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    panels = {name: title for name, title in _PANELS.items() if any(name in d for d in lines)}
    if not panels:
        raise UserError(f"{file} has none of {', '.join(_PANELS)}")
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False)
    for ax, (name, title) in zip(axes[0], panels.items(), strict=True):
        step, value = np.array([(d["step"], d[name]) for d in lines if d.get(name) is not None]).T
        ax.plot(step, value, lw=1)
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(_OUT.value, dpi=110)


if __name__ == "__main__":
    cli.run(main)
