"""Builds easy-vqa: captions, questions, recolour edits, a compositional split. Card: README.md.

The records follow the canonical fields of unifluid_jax/input/records.py, with `color`, `shape`,
`labels` and `official_split`.
"""

import io
import json
import os
import pathlib
import random
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from data import png
from data.fetch import EASY_VQA, fetch
from unifluid_jax.evals import shapes
from unifluid_jax.input.records import canonical_features

_LICENSE = pathlib.Path(__file__).with_name("LICENSE.txt")

COLORS = tuple(shapes.PALETTE)
SHAPES = shapes.SHAPES

# One combination per shape, three colours: each of them is well known to the model from the two
# other shapes.
HELD_OUT = frozenset({("teal", "circle"), ("red", "rectangle"), ("yellow", "triangle")})

INSTRUCTIONS = (
    "make it {color}",
    "make the {shape} {color}",
    "turn the shape {color}",
    "change the color to {color}",
    "change the color of the {shape} to {color}",
)
VARIANTS = 3  # recoloured copies of each captioned picture


class Builder(tfds.core.GeneratorBasedBuilder):
    """One record is one official picture, with three recoloured copies as targets of edits."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = canonical_features(
            (64, 64, 3), color=text, shape=text, labels=text, official_split=text
        )
        return self.dataset_info_from_configs(
            features=features,
            homepage="https://github.com/vzhou842/easy-VQA",
            license=read_license(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # The source is a wheel, fetched by name and version.
        splits = {"train": [], "test": [], "compositional": []}
        for split, record in read_wheel(fetch(EASY_VQA, self._data_dir_root)):
            splits[split].append(record)
        return {split: self._generate_examples(records) for split, records in splits.items()}

    def _generate_examples(self, records: Iterable[dict]) -> Iterator[tuple[str, dict]]:
        for record in records:
            yield record["id"], record


def read_license() -> str:
    """The licence of easy-VQA, under which all that is made of it is."""
    return _LICENSE.read_text(encoding="utf-8")


def read_wheel(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """All records of the wheel, in the official order, each after the split it belongs to."""
    with zipfile.ZipFile(path) as wheel:
        for official_split in ("train", "test"):
            root = f"easy_vqa/data/{official_split}"
            questions: dict[int, list[tuple[str, str]]] = {}
            for question, answer, number in json.loads(wheel.read(f"{root}/questions.json")):
                questions.setdefault(number, []).append((question, answer))
            for number in sorted(questions):
                file = wheel.read(f"{root}/images/{number}.png")
                yield make_record(official_split, number, file, questions[number])


def make_record(
    official_split: str, number: int, file: bytes, questions: Sequence[tuple[str, str]]
) -> tuple[str, dict]:
    """The split that one official picture belongs to, and its record."""
    image_HWC = png.decode(file)
    color, shape = labels_from_answers(questions)
    labels = "answers" if color and shape else "pixels"
    if labels == "pixels":
        # Questions only, but no held-out combination must slip into another split.
        judged = shapes.judge(image_HWC)
        color, shape = judged.color or "", judged.shape or ""
    identity = f"{official_split}/{number}"
    held_out = (color, shape) in HELD_OUT
    images, captions, edits = [file], [], []
    if labels == "answers":
        captions.append({"image": 0, "text": f"a {color} {shape}"})
        rng = random.Random(identity)
        allowed = [c for c in COLORS if c != color and (c, shape) not in HELD_OUT]
        for target, new_color in enumerate(rng.sample(allowed, VARIANTS), start=1):
            recolored = recolor(image_HWC, shapes.PALETTE[color], shapes.PALETTE[new_color])
            images.append(png.encode(recolored))
            # A held-out picture is what its edits must produce: the combination that no training
            # example shows.
            source, target, wanted = (target, 0, color) if held_out else (0, target, new_color)
            instruction = rng.choice(INSTRUCTIONS).format(color=wanted, shape=shape)
            edits.append({"source": source, "target": target, "instruction": instruction})
    record = {
        "id": identity,
        "images": [io.BytesIO(image) for image in images],
        "captions": captions,
        "questions": [{"image": 0, "question": q, "answer": a} for q, a in questions],
        "edits": edits,
        "color": color,
        "shape": shape,
        "labels": labels,
        "official_split": official_split,
    }
    return "compositional" if held_out else official_split, record


def labels_from_answers(questions: Iterable[tuple[str, str]]) -> tuple[str, str]:
    """Colour and shape that the questions and answers state; "" for what none of them states.

    Stated is what an answer names, what a "what" question takes for granted ("what color is the
    circle?"), and what a yes/no question affirms ("is there not a red shape?", "no"). Nothing is
    inferred from what is absent.
    """
    stated: set[str] = set()
    for question, answer in questions:
        words = question.rstrip("?").split()
        if answer not in ("yes", "no"):
            stated |= {answer, *words}
        elif (answer == "yes") != bool({"not", "no"} & set(words)):
            stated |= set(words)
    found = []
    for options in (COLORS, SHAPES):
        named = sorted(stated & set(options))
        if len(named) > 1:
            raise ValueError(f"contradictory answers about one picture: {named}")
        found.append(named[0] if named else "")
    return found[0], found[1]


def recolor(
    image_HWC: UInt8[np.ndarray, "H W 3"], color: Sequence[int], new_color: Sequence[int]
) -> UInt8[np.ndarray, "H W 3"]:
    """The same picture with its shape of one RGB colour in another; the background stays."""
    pixels_HWC = shapes.to_255(image_HWC)
    background = shapes.background_color(pixels_HWC)
    old, new = (np.asarray(rgb, np.float32) for rgb in (color, new_color))
    alpha_HW1 = shapes.coverage(pixels_HWC, background, old)[..., None]
    return np.clip(np.rint(pixels_HWC + alpha_HW1 * (new - old)), 0, 255).astype(np.uint8)
