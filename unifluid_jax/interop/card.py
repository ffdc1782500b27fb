"""The model card of an exported model."""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from unifluid_jax.errors import UserError
from unifluid_jax.input import pipeline
from unifluid_jax.interop.rules import Leaf


def card(
    name: str,
    config: ConfigDict,
    leaves: Mapping[str, Leaf],
    step: int,
    scores: Mapping[str, Any] | None,
) -> str:
    """The text of the card, Markdown.

    Args:
        leaves: the parameters.
        step: that they were trained to; 0 of a converted model.
        scores: what `unifluid evaluate` wrote for them, if it has run.
    """
    count = sum(math.prod(leaf.shape) for leaf in leaves.values())
    c = config.model
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
    ]
    if step:
        data = sorted({entry["dataset"] for entry in pipeline.mixture(config)})
        tasks = sorted({entry["task"] for entry in pipeline.mixture(config)})
        lines += [
            f"| trained for | {step:,} steps of {config.input.batch_size} packed rows of"
            f" {config.input.seq_len} positions |",
            f"| begun from | {config.init_from or 'fresh weights'} |",
            f"| on | {', '.join(data)} |",
            f"| tasks | {', '.join(tasks)} |",
        ]
    lines.append("")
    if scores is not None:
        lines += ["| score | | examples |", "|---|---|---|"]
        for key, value in scores["scores"].items():
            lines.append(f"| {key} | {value:.3f} | {scores['examples'][key.split('/')[0]]} |")
        lines += ["", f"Measured with {json.dumps(scores['sampling'])}.", ""]
    lines += ["What the model makes is bound by the licences of its data: see their cards.", ""]
    return "\n".join(lines)


def scores_of(folder: epath.Path, weights: str) -> dict[str, Any] | None:
    """What `unifluid evaluate` wrote for a step, if it has run with these weights.

    Args:
        folder: of the step, WORKDIR/checkpoints/STEP.
        weights: "ema" or "params".

    Raises:
        UserError: it is damaged.
    """
    file = folder.parent.parent / "evals" / folder.name / "scores.json"
    if not file.exists():
        return None
    try:
        scores = json.loads(file.read_text())
        return scores if scores["weights"] == weights else None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}): evaluate anew, or remove it") from None
