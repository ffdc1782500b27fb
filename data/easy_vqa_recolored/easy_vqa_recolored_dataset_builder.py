"""Builds easy_vqa_recolored: a record for each recoloured copy of easy_vqa. Card: README.md."""

from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from data.easy_vqa import easy_vqa_dataset_builder as easy_vqa
from data.fetch import EASY_VQA, fetch
from unifluid_jax.input.records import canonical_features


class Builder(tfds.core.GeneratorBasedBuilder):
    """One record is one copy with its caption."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

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
            if split == "train":
                for copy in copies(record):
                    yield copy["id"], copy


def copies(record: Mapping[str, Any]) -> Iterator[dict]:
    """A record of its own for each target of the edits of an easy_vqa record."""
    for edit in record["edits"]:
        target = edit["target"]
        (color,) = set(edit["instruction"].split()) & set(easy_vqa.COLORS)
        yield {
            "id": f"{record['id']}/{target}",
            "images": [record["images"][target]],
            "captions": [{"image": 0, "text": f"a {color} {record['shape']}"}],
            "questions": [],
            "edits": [],
            "color": color,
            "shape": record["shape"],
        }
