"""Scores a trained model: runs the evaluations of its config and writes what they found.

    unifluid evaluate --workdir=runs/quickstart
    unifluid evaluate --workdir=runs/quickstart --evals=vqa,generate --config.sampling.guidance=5

Writes WORKDIR/evals/STEP/scores.json, with all that the scores depend on, and pictures.png; for a
shipped model into runs/NAME/evals/STEP.
"""

import dataclasses
import datetime
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import rich.console
import rich.table
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from unifluid_jax import cli, evals, inference, pretrained
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.evals import grid
from unifluid_jax.evals.base import EvalConfig, Outcome
from unifluid_jax.input.records import open_builder
from unifluid_jax.models.gemma import GemmaConfig

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run to score, exported folder or name of a shipped model.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint, by default the latest.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "params"], "Averaged weights (ema) or raw ones."
)
_EVALS = flags.DEFINE_list("evals", None, "Names in config.evals, by default all.")
_OUT = flags.DEFINE_string("out", None, "Folder to write to, by default WORKDIR/evals/STEP.")
_CONFIG = cli.config_flag(stored=lambda: inference.stored_config(_WORKDIR.value, _STEP.value))

# Packages that a score may depend on.
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "pillow", "sentencepiece", "unifluid_jax")


def main(argv: list[str]) -> None:
    cli.positional(argv)
    config, console = _CONFIG.value, rich.console.Console(soft_wrap=True, highlight=False)
    wanted = _choose(evals.check(config), _EVALS.value)
    model = inference.load(_WORKDIR.value, _WEIGHTS.value, _STEP.value, config=config)
    out = Path(_OUT.value or default_folder(_WORKDIR.value, model.origin))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; set --out") from error
    outcomes = {}
    for name, c in wanted.items():
        with console.status(f"{name}: {c.type} on {c.dataset}/{c.split}"):
            outcomes[name] = evals.run_one(config, model, c)
    report = {
        "checkpoint": model.origin.folder,
        "step": model.origin.step,
        "weights": model.origin.weights,
        **_circumstances(config, wanted),
        "scores": {
            f"{name}/{score}": value
            for name, outcome in outcomes.items()
            for score, value in outcome.scores.items()
        },
        "examples": {name: outcome.count for name, outcome in outcomes.items()},
        "seconds": {name: round(outcome.seconds, 1) for name, outcome in outcomes.items()},
    }
    # Put in place whole: a killed run leaves the file of the run before.
    partial = out / ".scores.json.partial"
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(out / "scores.json")
    console.print(_table(wanted, outcomes))
    console.print(f"scores in {out / 'scores.json'}")
    sections = {
        f"{name}: {wanted[name].dataset}/{wanted[name].split}": outcome.tiles
        for name, outcome in outcomes.items()
    }
    if any(sections.values()):
        Image.fromarray(grid.sheet(sections)).save(out / "pictures.png")
        console.print(f"pictures in {out / 'pictures.png'}")


def default_folder(workdir: str, origin: inference.Origin) -> Path:
    """Where the scores of a model of `--workdir` are written unless --out is set."""
    root = pretrained.find(workdir)
    if root is None:
        # --workdir may name the run's checkpoints, or one: nothing is written into these.
        root = Path(origin.folder).parents[1]
    elif pretrained.is_shipped(root):
        root = Path("runs", root.name)
    return root / "evals" / str(origin.step)


def _choose(known: Mapping[str, EvalConfig], names: list[str] | None) -> dict[str, EvalConfig]:
    if not known:
        raise UserError("config.evals is empty: there is nothing to score")
    for name in names or ():
        if name not in known:
            raise UserError(f'no evaluation "{name}" in config.evals{nearest(name, known)}')
    return {name: known[name] for name in names or known}


def _circumstances(config: ConfigDict, wanted: Mapping[str, EvalConfig]) -> dict[str, Any]:
    """All else that the scores depend on."""
    datasets = sorted({c.dataset for c in wanted.values()})
    return {
        "sampling": configs.to_json(config)["sampling"],
        "dtype": config.model.backbone.get("dtype", GemmaConfig.dtype),
        "evals": {name: dataclasses.asdict(c) for name, c in wanted.items()},
        "data": {name: str(open_builder(name, config.data_dir).info.version) for name in datasets},
        "image_tokenizer": config.image_tokenizer.path,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _table(wanted: Mapping[str, EvalConfig], outcomes: Mapping[str, Outcome]) -> rich.table.Table:
    table = rich.table.Table("evaluation", "data", "examples", "scores", "seconds", box=None)
    for name, outcome in outcomes.items():
        scores = "  ".join(f"{score} {value:.3f}" for score, value in outcome.scores.items())
        data = f"{wanted[name].dataset}/{wanted[name].split}"
        table.add_row(name, data, str(outcome.count), scores or "-", f"{outcome.seconds:.1f}")
    return table


if __name__ == "__main__":
    cli.run(main)
