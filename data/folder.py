"""A folder of pictures and texts as a data set.

    my_pictures/train.jsonl          one split a file, one record a line
    my_pictures/test.jsonl
    my_pictures/photos/0001.jpg      where the lines say

A line is an object with the path of its picture, and one or more of the three kinds of text:

    {"image": "photos/0001.jpg", "caption": "a red bicycle at a wall"}
    {"image": "photos/0001.jpg", "question": "what color is it?", "answer": "red"}
    {"image": "photos/0001.jpg", "edited": "photos/0001_blue.png", "instruction": "make it blue"}

Each may be a list: of captions of one picture, of questions with as many answers, of edits with as
many instructions. "id" is optional. Pictures may have any size.
"""

import dataclasses
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image

from data import png
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.input.records import canonical_features
from unifluid_jax.pictures import to_array

_KEYS = ("id", "image", "caption", "question", "answer", "edited", "instruction")


@dataclasses.dataclass(frozen=True)
class Line:
    """A checked line: paths of pictures, the first of them the one that the texts are about."""

    where: str
    id: str
    images: list[Path]
    captions: list[str]
    questions: list[tuple[str, str]]
    instructions: list[str]


def read(folder: str | os.PathLike) -> dict[str, list[Line]]:
    """The splits of a folder. Looks whether every picture is there, and opens none.

    Raises:
        UserError: names the file, the line and what is wrong with it.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    if not files:
        raise UserError(f"no .jsonl file in {folder}: write one a split, like train.jsonl")
    splits = {}
    for file in files:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", file.stem):
            raise UserError(
                f"{file} cannot name a split: lower-case letters, digits and _, like train.jsonl"
            )
        try:
            texts = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from error
        lines = [
            _line(folder, f"{file}:{number}", f"{file.stem}/{number}", text)
            for number, text in enumerate(texts, start=1)
            if text.strip()
        ]
        if not lines:
            raise UserError(f"{file} has no line: write a record or remove it")
        splits[file.stem] = lines
    return splits


def _line(folder: Path, where: str, identity: str, text: str) -> Line:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise UserError(f'{where} is no object: write it like {{"image": ..., "caption": ...}}')
    for key in fields:
        if key not in _KEYS:
            raise UserError(f'{where}: unknown key "{key}"{nearest(key, _KEYS)}')
    found = {key: _texts(where, key, fields.get(key)) for key in _KEYS}
    for key in ("id", "image"):
        if len(found[key]) > 1:
            raise UserError(f'{where}: "{key}" is a list: give one')
    for one, other in (("question", "answer"), ("edited", "instruction")):
        if len(found[one]) != len(found[other]):
            raise UserError(
                f'{where}: {len(found[one])} "{one}" and {len(found[other])} "{other}": give as'
                " many of both"
            )
    if not found["image"]:
        raise UserError(f'{where} has no "image": give the path of a picture')
    if not (found["caption"] or found["question"] or found["edited"]):
        raise UserError(f"{where} has no text: give a caption, a question or an edit")
    images = [folder / path for path in found["image"] + found["edited"]]
    for image in images:
        if not image.is_file():
            raise UserError(f'{where}: no picture "{image}"')
    return Line(
        where,
        next(iter(found["id"]), identity),
        images,
        found["caption"],
        list(zip(found["question"], found["answer"], strict=True)),
        found["instruction"],
    )


def _texts(where: str, key: str, value: Any) -> list[str]:
    """One text or many, none of them empty."""
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    for text in values:
        if not (isinstance(text, str) and text.strip()):
            raise UserError(f'{where}: "{key}" must be text, or a list of texts, got {text!r}')
    return values


def build(folder: str | os.PathLike, name: str, data_dir: str | os.PathLike) -> Path:
    """Writes the data set; an older one of this name is replaced when all is done.

    Returns:
        Its folder.

    Raises:
        UserError: as `read`; also a name that cannot be one, and a picture that cannot be read.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f'"{name}" cannot name a data set: give --name, lower-case letters, digits and _'
        )
    target = Path(data_dir) / name
    if target.exists() and not (target / "1.0.0" / _MARK).exists():
        raise UserError(f"{target} is a data set of another origin: give --name another")
    splits = read(folder)
    Path(data_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".partial-") as partial:
        builder = _builder(name, splits)(data_dir=partial, file_format="array_record")
        builder.download_and_prepare()
        path = Path(builder.data_path)
        (path / _MARK).write_text(f"{Path(folder).resolve()}\n")
        shutil.rmtree(target, ignore_errors=True)
        path.parent.rename(target)
    return target


# Says that a data set was made here, and of which folder.
_MARK = "imported_from.txt"


def _builder(name: str, splits: dict[str, list[Line]]) -> type[tfds.core.GeneratorBasedBuilder]:
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = canonical_features((None, None, 3))
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager: tfds.download.DownloadManager):
            del dl_manager
            return {split: self._generate_examples(lines) for split, lines in splits.items()}

        def _generate_examples(self, lines: list[Line]) -> Iterator[tuple[int, dict]]:
            for number, line in enumerate(lines):
                yield number, _record(line)

    Builder.name = name
    return Builder


def _record(line: Line) -> dict[str, Any]:
    return {
        "id": line.id,
        "images": [io.BytesIO(_encoded(line.where, path)) for path in line.images],
        "captions": [{"image": 0, "text": text} for text in line.captions],
        "questions": [{"image": 0, "question": q, "answer": a} for q, a in line.questions],
        "edits": [
            {"source": 0, "target": target, "instruction": text}
            for target, text in enumerate(line.instructions, start=1)
        ],
    }


def _encoded(where: str, path: Path) -> bytes:
    """The bytes of a plain picture as they are; others as inference sees them, as PNG."""
    try:
        pixels = to_array(path)  # every byte of it is decoded here, not in the middle of a training
        with Image.open(path) as picture:
            plain = picture.format in ("JPEG", "PNG") and picture.mode == "RGB"
            turned = picture.getexif().get(0x0112, 1) != 1
            clear = picture.has_transparency_data
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return path.read_bytes() if plain and not (turned or clear) else png.encode(pixels)
