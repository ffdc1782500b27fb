"""Uses a trained model: text to picture, picture and text to picture, picture to text.

    unifluid sample generate --workdir=runs/quickstart --prompt="a red circle" --n=4
    unifluid sample edit --workdir=runs/quickstart --image=circle.png --prompt="make it blue"
    unifluid sample caption --workdir=runs/quickstart --image=circle.png --image=square.png
    unifluid sample answer --workdir=runs/quickstart --image=circle.png --prompt="what color is it?"

--prompt and --image may be given many times: one of either goes with all of the other, else they
are taken in pairs. Pictures are written to --out as PNG, with a sheet of all of them
(sheet.png), and one JSON line for each (samples.jsonl) that says how it was made; a later call
adds to the lines and replaces no picture. Settings are those of config.sampling:
--config.sampling.guidance=5.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from unifluid_jax import checkpoint, cli, inference
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError
from unifluid_jax.evals import grid
from unifluid_jax.evals.base import Tile, beside

_WORKDIR = flags.DEFINE_string("workdir", None, "Run or checkpoint to use.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint, by default the latest.")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "params"], "Averaged weights or raw ones.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text; may be repeated.")
_IMAGE = flags.DEFINE_multi_string("image", [], "Picture file; may be repeated.")
_N = flags.DEFINE_integer("n", 1, "Pictures for each prompt.")
_SEED = flags.DEFINE_integer("seed", None, "Seed, by default config.sampling.seed.")
_OUT = flags.DEFINE_string("out", "samples", "Folder for pictures, sheet and JSON lines.")
_CONFIG = cli.config_flag(stored=lambda: checkpoint.stored_config(_WORKDIR.value, _STEP.value))

# What each command takes: (pictures, texts).
_TAKES = {
    "generate": (False, True),
    "edit": (True, True),
    "caption": (True, False),
    "answer": (True, True),
}


def main(argv: list[str]) -> None:
    (command,) = cli.positional(argv, "|".join(_TAKES))
    for flag, wanted in zip((_IMAGE, _PROMPT), _TAKES[command], strict=True):
        if wanted != bool(flag.value):
            state = "needs" if wanted else "takes no"
            raise UserError(f"`unifluid sample {command}` {state} --{flag.name}")
    images = [inference.to_array(path) for path in _IMAGE.value]
    config, folder = _CONFIG.value, Path(_OUT.value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; set --out") from error
    model = inference.from_checkpoint(config, _WORKDIR.value, _WEIGHTS.value, _STEP.value)
    if command in ("caption", "answer"):
        if command == "caption":
            texts = model.caption(images, seed=_SEED.value)
        else:
            texts = model.answer(images, _PROMPT.value, seed=_SEED.value)
        for asked, text in zip(_asked(), texts, strict=True):
            print(*asked.values(), text, sep="\t")
        lines = [asked | {"text": text} for asked, text in zip(_asked(), texts, strict=True)]
        _write_lines(lines, command, config, folder)
        return
    if command == "generate":
        pictures = model.generate(_PROMPT.value, _N.value, seed=_SEED.value)
    else:
        pictures = model.edit(images, _PROMPT.value, _N.value, seed=_SEED.value)
    _write_pictures(pictures, command, config, folder)


def _asked() -> Iterator[dict[str, str]]:
    """The image and prompt of each request, as the model pairs them up."""
    images, prompts = _IMAGE.value, _PROMPT.value
    for i in range(max(len(images), len(prompts))):
        asked = {}
        if images:
            asked["image"] = images[i % len(images)]
        if prompts:
            asked["prompt"] = prompts[i % len(prompts)]
        yield asked


def _write_pictures(
    pictures: list[Image.Image], command: str, config: ConfigDict, folder: Path
) -> None:
    number = max((int(path.name[:5]) for path in folder.glob("[0-9]" * 5 + "-*.png")), default=-1)
    lines, tiles = [], []
    for i, picture in enumerate(pictures):
        asked = list(_asked())[i // _N.value]
        name = re.sub(r"\W+", "-", asked["prompt"].lower()).strip("-")[:60]
        path = folder / f"{number + 1 + i:05d}-{name}.png"
        picture.save(path)
        lines.append(asked | {"number": i % _N.value, "file": path.name})
        shown = np.asarray(picture)
        if "image" in asked:
            source = Image.fromarray(inference.to_array(asked["image"])).resize(picture.size)
            shown = beside(np.asarray(source), shown)
        tiles.append(Tile(shown, asked["prompt"]))
    _write_lines(lines, command, config, folder)
    Image.fromarray(grid.sheet({"": tiles})).save(folder / "sheet.png")
    print(f"{len(pictures)} pictures in {folder}, all of them on {folder / 'sheet.png'}")


def _write_lines(
    lines: list[dict[str, Any]], command: str, config: ConfigDict, folder: Path
) -> None:
    """Appends what was made, with all that is needed to make it again."""
    sampling = configs.to_json(config)["sampling"]
    if _SEED.value is not None:
        sampling["seed"] = _SEED.value
    how = {
        "command": command,
        "checkpoint": str(checkpoint.locate(_WORKDIR.value, _STEP.value)[0]),
        "weights": _WEIGHTS.value,
        "sampling": sampling,
    }
    with open(folder / "samples.jsonl", "a") as file:
        for line in lines:
            file.write(json.dumps(line | how) + "\n")


if __name__ == "__main__":
    cli.run(main)
