"""Records of TFDS data sets in one canonical form, pictures as undecoded bytes.

Our own builders (`data/`) write the canonical form. Any other TFDS data set plugs in by its name
and a mapping `fields` from names of ours to its own feature paths:

    {"images": "image", "captions": "captions/text"}                                 COCO captions
    {"images": "image", "questions": "question_answer/question",
     "answers": "question_answer/answer"}                                            CLEVR
    {"images": ["before", "after"], "edits": "instruction"}                          edit pairs
    {"images": "image", "captions": "label"}                                         class names

Texts may be one or many. Captions, and questions with their answers, are about the first picture;
an edit turns the first picture into the second. `id` is optional.
"""

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from google.protobuf import json_format
from jaxtyping import Int, UInt8
from PIL import Image
from tensorflow_datasets.core import dataset_info, read_only_builder

from unifluid_jax.errors import UserError, nearest

FIELDS = ("id", "images", "captions", "questions", "answers", "edits")

# The part of a record that each task draws from.
TASK_PARTS = {"caption": "captions", "vqa": "questions", "generate": "captions", "edit": "edits"}

# Splits up to this size on disk are read whole at the start and kept in memory, encoded.
_SMALL = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Record:
    """One concept: pictures, and what is known of them.

    Attributes:
        id: name of the record in its data set.
        images: encoded pictures (PNG or JPEG).
        captions: (image, text).
        questions: (image, question, answer).
        edits: (source image, target image, instruction).
        extra: all other features, bytes as str.
    """

    id: str
    images: list[bytes]
    captions: list[tuple[int, str]]
    questions: list[tuple[int, str, str]]
    edits: list[tuple[int, int, str]]
    extra: dict[str, Any]

    def image(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """One picture, decoded.

        Raises:
            ValueError: the bytes are no picture, or the record has no picture of this index.
        """
        if not 0 <= index < len(self.images):
            raise ValueError(f"no image {index}, it has {len(self.images)}")
        try:
            with Image.open(io.BytesIO(self.images[index])) as picture:
                return np.asarray(picture.convert("RGB"))
        except Exception as error:
            # Pillow raises many kinds over damaged bytes: OSError, SyntaxError, zlib.error.
            raise ValueError(f"image {index} cannot be decoded: {error}") from error


def canonical_features(
    shape: tuple[int | None, int | None, int], /, **extra: tfds.features.FeatureConnector
) -> tfds.features.FeaturesDict:
    """The canonical form, as a builder declares it.

    Args:
        shape: of the pictures; None for sizes that differ.
        **extra: features of the data set's own.
    """
    text, sequence = tfds.features.Text(), tfds.features.Sequence
    return tfds.features.FeaturesDict(
        {
            "id": text,
            "images": sequence(tfds.features.Image(shape=shape, encoding_format="png")),
            "captions": sequence({"image": np.int64, "text": text}),
            "questions": sequence({"image": np.int64, "question": text, "answer": text}),
            "edits": sequence({"source": np.int64, "target": np.int64, "instruction": text}),
            **extra,
        }
    )


def resized(image: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of `size` x `size`; another aspect is squashed (PaliGemma)."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves pictures encoded, inside sequences too, which TFDS's own class cannot."""

    def decode_batch_example_np(self, example: Any) -> Any:
        return example


class Records:
    """Random access to one split of a TFDS data set.

    Args:
        dataset: TFDS name, "name" or "name/config".
        split: a split of it, or one contiguous part of one ("train[:10%]").
        data_dir: where data sets lie.
        fields: from names of ours to feature paths of a foreign data set; empty for canonical ones.

    Attributes:
        name: data set and split, for messages.
        base, start: the whole split, and the index in it of the first record here.
        version, size: of the data set; records and bytes of the whole split.
        images: feature paths of the pictures.

    Raises:
        UserError: the data set or its split is missing, half-built, or lacks a field.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        data_dir: str | os.PathLike,
        fields: Mapping[str, str | Sequence[str]] | None = None,
    ):
        builder = open_builder(dataset, data_dir)
        self.dataset, self.name = dataset, f"{dataset}/{split}"
        self.version = str(builder.info.version)
        try:
            instruction = tfds.core.ReadInstruction.from_spec(split)
            (part,) = instruction.to_absolute(builder.info.splits)
        except (ValueError, NotImplementedError):
            known = ", ".join(builder.info.splits)
            raise UserError(
                f'data set {dataset} has no split "{split}" (it has {known}; parts of one are'
                ' written "train[:10%]")'
            ) from None
        self.base, self.start = part.splitname, part.from_ or 0
        info = builder.info.splits[self.base]
        stop = info.num_examples if part.to is None else part.to
        self._length = stop - self.start
        if self._length < 1 and info.num_examples:
            raise UserError(
                f"{self.name} holds no record of {info.num_examples}: it ends at {stop} and begins"
                f" at {self.start} (both ends are counted in the same unit)"
            )
        self.size = (info.num_examples, info.num_bytes)
        self._parser = _Parser(dataset, builder.info.features, fields)
        self.images = self._parser.images
        try:
            self._source = builder.as_data_source(self.base, decoders=self._parser.decoders)
        except NotImplementedError as error:
            raise UserError(
                f"data set {dataset} was not built as ArrayRecord ({error}): build it with"
                " `tfds build --file_format=array_record`"
            ) from error
        self._kept: dict[int, Record] | None = {} if info.num_bytes <= _SMALL else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: SupportsIndex) -> Record:
        """The record of this index.

        Raises:
            ValueError: it is corrupt.
        """
        index = int(index)
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        try:
            record = self._parser(self._source[self.start + index], f"{self.name}/{index}")
        except Exception as error:
            # Whatever a reader raises over damaged bytes: the caller decides if it is skipped.
            raise ValueError(f"{type(error).__name__}: {error}") from error
        if self._kept is not None:
            self._kept[index] = record
        return record

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes get the way to the records, not those that were read here.
        return {**vars(self), "_kept": None if self._kept is None else {}}

    def with_task(self, task: str) -> Int[np.ndarray, "R"]:
        """Indices of the records that have something for a task; unreadable ones are among them.

        Reads every record, unless the split is too large for that: then all of them are named, and
        those with nothing for the task have to be passed over later.
        """
        if self._kept is None:
            return np.arange(len(self))
        return np.array([i for i in range(len(self)) if self._has(task, i)], np.int64)

    def _has(self, task: str, index: int) -> bool:
        try:
            return bool(getattr(self[index], TASK_PARTS[task]))
        except ValueError:
            return True


def open_builder(dataset: str, data_dir: str | os.PathLike) -> tfds.core.DatasetBuilder:
    """The builder of a data set that lies complete in `data_dir`.

    Raises:
        UserError: it is not there, or half-built.
    """
    again = (
        f"run `unifluid data build {dataset}`, or for a data set of TFDS's own"
        f" `tfds build --file_format=array_record --data_dir={data_dir} {dataset}`"
    )
    try:
        builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        begun = any(Path(data_dir).glob(f"{dataset.partition(':')[0]}/**/*.array_record-*"))
        begun = begun or any(Path(data_dir).glob(f"{dataset.partition('/')[0]}/**/incomplete.*"))
        state = "half-built" if begun else "not built"
        raise UserError(f"data set {dataset} is {state} in {data_dir}: {again}") from None
    except (dataset_info.DatasetInfoFileError, json_format.ParseError) as error:
        raise UserError(
            f"data set {dataset} is half-built in {data_dir} ({error}): {again}"
        ) from None
    missing = find_missing(builder.data_path)
    if missing is not None:
        raise UserError(f"data set {dataset} is half-built in {data_dir} ({missing}): {again}")
    return builder


def find_missing(path: str | os.PathLike) -> str | None:
    """What a version folder of a TFDS data set lacks, in words; None when it is complete."""
    path = Path(path)
    if not (path / "dataset_info.json").exists():
        return "no dataset_info.json"
    for split in tfds.builder_from_directory(path).info.splits.values():
        for file, count in zip(split.filepaths, split.shard_lengths, strict=True):
            file = Path(file)
            if not file.exists():
                return f"no {file.name}"
            if "array_record" not in file.name:
                continue  # whoever reads it will say so
            try:
                found = array_record_module.ArrayRecordReader(str(file)).num_records()
            except (RuntimeError, ValueError) as error:
                return f"{file.name} is damaged ({error})"
            if found != count:
                return f"{file.name} has {found} records of {count}"
    return None


class _Parser:
    """Features of a data set to records; holds what was checked and looked up once.

    Attributes:
        images: feature paths of the pictures.
        decoders: for TFDS, to leave pictures encoded.
    """

    def __init__(
        self,
        dataset: str,
        features: tfds.features.FeaturesDict,
        fields: Mapping[str, str | Sequence[str]] | None,
    ):
        self._dataset, self._features = dataset, features
        self._fields = dict(fields or {})
        for name in self._fields:
            if name not in FIELDS:
                raise UserError(f'unknown field "{name}" of {dataset}{nearest(name, FIELDS)}')
        if not self._fields:
            for name in ("id", "images", "captions", "questions", "edits"):
                self._feature(name)
        elif "images" not in self._fields:
            raise UserError(f'the fields of {dataset} lack "images": name its pictures\' feature')
        elif ("questions" in self._fields) != ("answers" in self._fields):
            raise UserError(f'the fields of {dataset} need both "questions" and "answers"')
        images = self._fields.get("images", "images")
        self.images = [images] if isinstance(images, str) else list(images)
        self.decoders: dict[str, Any] = {}
        for path in self.images:
            if not isinstance(self._feature(path), tfds.features.Image):
                raise UserError(f'feature "{path}" of data set {dataset} is no image')
            *outer, last = path.split("/")
            node = self.decoders
            for part in outer:
                node = node.setdefault(part, {})
            node[last] = _Encoded()
        # Class labels are numbers with names.
        self._names = {
            name: feature.int2str
            for name, path in self._fields.items()
            if name != "images" and hasattr(feature := self._feature(path), "int2str")
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_features": None}  # for the checks above only

    def _feature(self, path: str) -> tfds.features.FeatureConnector:
        """The feature at a path, sequences looked through."""
        feature = self._features
        for part in path.split("/"):
            if not isinstance(feature, Mapping | tfds.features.FeaturesDict) or part not in feature:
                raise UserError(
                    f'data set {self._dataset} has no feature "{path}" (it has'
                    f" {', '.join(self._features)}): name its own in the mixture's fields"
                )
            feature = feature[part]
            while isinstance(feature, tfds.features.Sequence | tfds.features.Dataset):
                feature = feature.feature
        return feature

    def __call__(self, features: Mapping[str, Any], name: str) -> Record:
        return self._foreign(features, name) if self._fields else self._canonical(features)

    def _canonical(self, features: Mapping[str, Any]) -> Record:
        captions, questions, edits = (features[f] for f in ("captions", "questions", "edits"))
        known = ("id", "images", "captions", "questions", "edits")
        return Record(
            id=_text(features["id"]),
            images=[bytes(image) for image in features["images"]],
            captions=[
                (int(i), _text(t)) for i, t in zip(captions["image"], captions["text"], strict=True)
            ],
            questions=[
                (int(i), _text(q), _text(a))
                for i, q, a in zip(
                    questions["image"], questions["question"], questions["answer"], strict=True
                )
            ],
            edits=[
                (int(s), int(t), _text(i))
                for s, t, i in zip(
                    edits["source"], edits["target"], edits["instruction"], strict=True
                )
            ],
            extra={k: _plain(v) for k, v in features.items() if k not in known},
        )

    def _foreign(self, features: Mapping[str, Any], name: str) -> Record:
        images = []
        for path in self.images:
            found = _at(features, path)
            images += [found] if isinstance(found, bytes) else map(bytes, found)
        texts = {name: self._texts(features, name) for name in FIELDS if name != "images"}
        return Record(
            id=texts["id"][0] if texts["id"] else name,
            images=images,
            captions=[(0, text) for text in texts["captions"]],
            questions=[
                (0, q, a) for q, a in zip(texts["questions"], texts["answers"], strict=True)
            ],
            edits=[(0, 1, text) for text in texts["edits"]],
            extra={},
        )

    def _texts(self, features: Mapping[str, Any], name: str) -> list[str]:
        if name not in self._fields:
            return []
        value = _at(features, self._fields[name])
        values = [value] if isinstance(value, str | bytes) or np.ndim(value) == 0 else list(value)
        if name in self._names:
            return [self._names[name](int(v)) for v in values]
        return [_text(v) for v in values]


def _at(features: Mapping[str, Any], path: str) -> Any:
    for part in path.split("/"):
        features = features[part]
    return features


def _text(value: Any) -> str:
    if not isinstance(value, str | bytes):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value.decode() if isinstance(value, bytes) else value


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple | np.ndarray) and np.ndim(value):
        return [_plain(v) for v in value]
    return value.decode() if isinstance(value, bytes) else value
