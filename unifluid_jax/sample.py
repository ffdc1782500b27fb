"""Uses a trained model: text to picture, picture and text to picture, picture to text.

    unifluid sample generate --workdir=runs/quickstart --prompt="a red circle" --n=4
    unifluid sample generate --workdir=runs/quickstart --prompts=prompts.txt --out=pictures
    unifluid sample edit --workdir=runs/quickstart --image=circle.png --prompt="make it blue"
    unifluid sample inpaint --workdir=runs/quickstart --image=circle.png --mask=mask.png \
        --prompt="a red circle"
    unifluid sample caption --workdir=runs/quickstart --image=circle.png --image=square.png
    unifluid sample answer --workdir=runs/quickstart --image=circle.png --prompt="what color is it?"

--prompt, --image and --mask may be given many times: one of a kind goes with all of the others,
else they are taken in pairs. Pictures are written to --out as PNG, with a sheet of them
(sheet.png), and one JSON line for each (samples.jsonl) that says how it was made. What the lines
say is done is not done again: a call that was interrupted is finished by the same call, and a call
with other prompts, seeds or settings adds to the folder.

Settings are those of config.sampling; --settings changes them for the call, which it may also do
for what the config does not name: --settings=guidance=5,steps=10,order=raster.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
from absl import flags
from PIL import Image

from unifluid_jax import cli, inference, pictures
from unifluid_jax import config as configs
from unifluid_jax.errors import UserError
from unifluid_jax.evals import grid
from unifluid_jax.evals.base import Tile, beside
from unifluid_jax.requests import TASKS, Request, asked

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run, checkpoint, exported folder or name of a shipped model.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Which checkpoint, by default the latest.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["ema", "params"], "Averaged weights (the default) or raw ones."
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text; may be repeated.")
_PROMPTS = flags.DEFINE_string("prompts", None, "File with a text in every line.")
_IMAGE = flags.DEFINE_multi_string("image", [], "Picture file; may be repeated.")
_MASK = flags.DEFINE_multi_string("mask", [], "Mask, white where to draw anew; may be repeated.")
_N = flags.DEFINE_integer("n", 1, "Pictures for each prompt.")
_SEED = flags.DEFINE_integer("seed", None, "Seed, by default config.sampling.seed.")
_SETTINGS = flags.DEFINE_list("settings", [], "Settings of the call, like guidance=5,steps=10.")
_OUT = flags.DEFINE_string("out", "samples", "Folder for pictures, sheet and JSON lines.")
_CONFIG = cli.config_flag(stored=lambda: inference.stored_config(_WORKDIR.value, _STEP.value))

_FLAGS = {"images": _IMAGE, "masks": _MASK, "texts": _PROMPT}
_LINES = "samples.jsonl"
_SHEET = 240  # pictures on a sheet at most: one of thousands could not be opened


def main(argv: list[str]) -> None:
    (command,) = cli.positional(argv, "|".join(TASKS))
    given = {"images": _IMAGE.value, "masks": _MASK.value, "texts": _prompts()}
    takes, _ = TASKS[command]
    for name, flag in _FLAGS.items():
        if (name in takes) != bool(given[name]):
            state = "needs" if name in takes else "takes no"
            raise UserError(f"`unifluid sample {command}` {state} --{flag.name}")
    # What cannot be read is named before the seconds that a model takes.
    files = {
        name: [pictures.to_array(path) for path in given[name]] for name in ("images", "masks")
    }
    settings, folder = _settings(), Path(_OUT.value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; set --out") from error
    model = inference.load(_WORKDIR.value, _WEIGHTS.value, _STEP.value, config=_CONFIG.value)
    what = [files.get(name, given["texts"]) for name in takes]
    requests = model.requests(command, *what, n=_N.value)
    columns = {_FLAGS[name].name: given[name] for name in takes}
    _Job(command, model, settings, requests, columns, folder).run()


def _prompts() -> list[str]:
    """The texts of --prompt, then those of --prompts."""
    if _PROMPTS.value is None:
        return _PROMPT.value
    try:
        lines = Path(_PROMPTS.value).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text in UTF-8"
        raise UserError(f"--prompts={_PROMPTS.value}: {reason}") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UserError(f"--prompts={_PROMPTS.value}: there is no line with a text in it")
    return [*_PROMPT.value, *found]


def _settings() -> dict[str, Any]:
    settings = {}
    for item in _SETTINGS.value:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserError(f'--settings: "{item}" is no setting, write name=value')
        try:
            settings[name.strip()] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name.strip()] = text  # a word
    return settings


class _Job:
    """The requests of one call, and the folder in which some may be done already."""

    def __init__(
        self,
        command: str,
        model: inference.Model,
        settings: dict[str, Any],
        requests: list[Request],
        columns: dict[str, list[str]],
        folder: Path,
    ):
        self._model, self._requests, self._folder = model, requests, folder
        self._makes_text = command in ("caption", "answer")
        self._parsed = (model.writing if self._makes_text else model.drawing)(**settings)
        sampling = configs.to_json(model.config)["sampling"] | settings
        if _SEED.value is not None:
            sampling["seed"] = _SEED.value
        how = {
            "command": command,
            "checkpoint": model.origin.folder,
            "weights": model.origin.weights,
            "sampling": sampling,
        }
        # The line of every request, but for what comes out.
        self._lines = [
            {name: values[i // _N.value % len(values)] for name, values in columns.items()}
            | {"number": request.number, "id": asked(request)}
            | how
            for i, request in enumerate(requests)
        ]

    def run(self) -> None:
        """Does what is not done, and shows all of it."""
        done = self._done()
        todo = [i for i in range(len(self._requests)) if i not in done]
        make = self._model.write if self._makes_text else self._model.draw
        results = make([self._requests[i] for i in todo], self._parsed, _SEED.value)
        if self._makes_text:
            self._write_texts(done, todo, results)
        else:
            self._write_pictures(done, todo, results)

    def _done(self) -> dict[int, dict[str, Any]]:
        """The finished lines, by the requests that they answer."""
        path, lines = self._folder / _LINES, {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                line = json.loads(line)
                complete = "text" in line or (self._folder / line["file"]).is_file()
            except (ValueError, KeyError, TypeError) as error:
                if number == text.count("\n") + 1:  # the last line of a call that was killed
                    path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
                    break
                raise UserError(
                    f"line {number} of {path} says nothing of a picture or text: remove it, or take"
                    " another --out"
                ) from error
            if complete:
                lines[_key(line)] = line
        return {i: lines[_key(x)] for i, x in enumerate(self._lines) if _key(x) in lines}

    def _write_texts(
        self, done: dict[int, dict[str, Any]], todo: list[int], results: Iterator[str]
    ) -> None:
        for i, text in zip(todo, results, strict=True):
            done[i] = self._lines[i] | {"text": text}
            self._append(done[i])
        for _, line in sorted(done.items()):
            print(*(line[name] for name in ("image", "prompt", "text") if name in line), sep="\t")

    def _write_pictures(
        self, done: dict[int, dict[str, Any]], todo: list[int], results: Iterator[Image.Image]
    ) -> None:
        folder, skipped = self._folder, len(done)
        numbers = (int(path.name[:5]) for path in folder.glob("[0-9]" * 5 + "-*.png"))
        number = max(numbers, default=-1)
        console = rich.console.Console(stderr=True)
        with rich.progress.Progress(console=console, disable=not console.is_terminal) as progress:
            results = progress.track(results, total=len(todo), description="pictures")
            for i, picture in zip(todo, results, strict=True):
                number += 1
                line = self._lines[i]
                name = re.sub(r"\W+", "-", line["prompt"].lower()).strip("-")[:60]
                path = folder / f"{number:05d}-{name}.png"
                picture.save(path)
                done[i] = line | {"file": path.name}
                self._append(done[i])
        tiles = [self._tile(line) for _, line in sorted(done.items())[:_SHEET]]
        Image.fromarray(grid.sheet({"": tiles})).save(folder / "sheet.png")
        before = f", {skipped} of them from before" if skipped else ""
        shown = "all" if len(tiles) == len(done) else f"the first {len(tiles)}"
        print(
            f"{len(done)} pictures in {folder}{before}, {shown} of them on {folder / 'sheet.png'}"
        )

    def _tile(self, line: dict[str, Any]) -> Tile:
        picture = pictures.to_array(self._folder / line["file"])
        if "image" in line:
            source = Image.fromarray(pictures.to_array(line["image"]))
            source = np.asarray(source.resize(picture.shape[1::-1]))
            picture = beside(source, picture)
        return Tile(picture, line["prompt"])

    def _append(self, line: dict[str, Any]) -> None:
        with open(self._folder / _LINES, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _key(line: dict[str, Any]) -> str:
    """What a line says of how its picture or text was made."""
    fields = ("command", "id", "number", "checkpoint", "weights", "sampling")
    return json.dumps([line.get(name) for name in fields], sort_keys=True)


if __name__ == "__main__":
    cli.run(main)
