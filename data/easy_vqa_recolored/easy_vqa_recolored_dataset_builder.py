"""Builds easy_vqa_recolored: a record for each recoloured copy of easy_vqa. Card: README.md."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from data import png
from data.easy_vqa import easy_vqa_dataset_builder as easy_vqa
from data.fetch import EASY_VQA, fetch
from unifluid_jax.evals import shapes
from unifluid_jax.input.records import canonical_features

# Eight colours beside easy_vqa's eight. The closest two of the sixteen, olive and brown, are 102
# apart (Euclidean, 0-255); of easy_vqa's own, red and brown, 108.
PALETTE = shapes.PALETTE | {
    "cyan": (0, 255, 255),
    "lime": (128, 255, 0),
    "magenta": (255, 0, 255),
    "navy": (0, 0, 128),
    "olive": (128, 128, 0),
    "orange": (255, 128, 0),
    "pink": (255, 128, 192),
    "purple": (128, 0, 192),
}


class Builder(tfds.core.GeneratorBasedBuilder):
    """One record is one copy with its caption."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "1.0.0": "First release: the targets of easy_vqa's edits.",
        "2.0.0": "A copy in every other colour, and eight colours more.",
    }

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return self.dataset_info_from_configs(
            features=canonical_features((64, 64, 3), color=text, shape=text),
            homepage="https://github.com/vzhou842/easy-VQA",
            license=easy_vqa.read_license(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # The source is a wheel, fetched by name and version.
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        for split, record in easy_vqa.read_wheel(fetch(EASY_VQA, self._data_dir_root)):
            if split == "train" and record["captions"]:
                for copy in copies(record):
                    yield copy["id"], copy


def copies(record: Mapping[str, Any]) -> Iterator[dict]:
    """A captioned easy_vqa record's picture in every other colour that its shape may have."""
    image_HWC, shape = png.decode(record["images"][0].getvalue()), record["shape"]
    for color, rgb in PALETTE.items():
        if color == record["color"] or (color, shape) in easy_vqa.HELD_OUT:
            continue
        image = easy_vqa.recolor(image_HWC, PALETTE[record["color"]], rgb)
        article = "an" if color[0] in "aeiou" else "a"
        yield {
            "id": f"{record['id']}/{color}",
            "images": [io.BytesIO(png.encode(image))],
            "captions": [{"image": 0, "text": f"{article} {color} {shape}"}],
            "questions": [],
            "edits": [],
            "color": color,
            "shape": shape,
        }
