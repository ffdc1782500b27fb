"""Latents of a data set's pictures, computed once: posterior moments under the image tokenizer.

One ArrayRecord file per split, one entry per record, in the split's order: float16
[2, images, N, C], raw mean and standard deviation. Mean *and* standard deviation, so that the
posterior's sample is drawn anew in every epoch (MAR). `latents.json` beside them says what they
were made of and with.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float, UInt8

from unifluid_jax.errors import UserError
from unifluid_jax.input.records import Records, open_builder, resized

if TYPE_CHECKING:
    from unifluid_jax.image_tokenizer import ImageTokenizer

_INFO = "latents.json"
_CHUNK = 512  # pictures encoded at a time
_AGAIN = "run `unifluid data latents --config=...`"


def folder(dataset: str, data_dir: str | os.PathLike) -> Path:
    """Where the latents of a data set lie: `latents/openmoji/64px`, also for "openmoji" alone.

    Raises:
        UserError: the data set is not built.
    """
    name = open_builder(dataset, data_dir).info.full_name  # name[/config]/version
    return Path(data_dir) / "latents" / name.rpartition("/")[0]


def build_cache(
    dataset: str,
    data_dir: str | os.PathLike,
    tokenizer: "ImageTokenizer",
    progress: Callable[[int], Any] = lambda done: None,
    fields: Mapping[str, str | Sequence[str]] | None = None,
) -> Path:
    """Encodes every picture of every split; what was cached before is replaced at the very end.

    Args:
        progress: called with the number of pictures done since its last call.
        fields: of a foreign data set, as for `Records`.

    Returns:
        The folder.

    Raises:
        UserError: the data set is not built.
    """
    target = folder(dataset, data_dir)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    info = open_builder(dataset, data_dir).info
    for split in info.splits:
        records = Records(dataset, split, data_dir, fields)
        writer = array_record_module.ArrayRecordWriter(str(partial / split), "group_size:1")
        waiting: list[UInt8[np.ndarray, "H W 3"]] = []
        sizes: list[int] = []
        for index in range(len(records)):
            images = _pictures(records, index, tokenizer.config.image_size)
            waiting += images
            sizes.append(len(images))
            if len(waiting) >= _CHUNK or index == len(records) - 1:
                _write(writer, tokenizer, waiting, sizes)
                progress(len(waiting))
                waiting, sizes = [], []
        writer.close()
    meta = {
        "dataset": info.full_name,
        "version": str(info.version),
        "images": records.images,
        "sizes": {
            name: [split.num_examples, split.num_bytes] for name, split in info.splits.items()
        },
        "tokenizer": tokenizer.fingerprint,
        "image_tokens": tokenizer.config.image_tokens,
        "token_dim": tokenizer.config.token_dim,
    }
    (partial / _INFO).write_text(json.dumps(meta, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def _pictures(records: Records, index: int, size: int) -> list[UInt8[np.ndarray, "H W 3"]]:
    """The pictures of a record; none of one that is corrupt, which the pipeline will name."""
    try:
        record = records[index]
        return [resized(record.image(i), size) for i in range(len(record.images))]
    except ValueError:
        return []


def _write(writer: Any, tokenizer: "ImageTokenizer", images: list, sizes: list[int]) -> None:
    shape = (2, 0, tokenizer.config.image_tokens, tokenizer.config.token_dim)
    moments = np.zeros(shape, np.float16)
    if images:
        moments = np.stack(tokenizer.encode(np.stack(images))).astype(np.float16)
    at = 0
    for size in sizes:
        writer.write(np.ascontiguousarray(moments[:, at : at + size]).tobytes())
        at += size


class LatentCache:
    """Random access to the cached latents of the records of one split.

    Args:
        records: what they belong to.
        fingerprint: of the image tokenizer in use.

    Raises:
        UserError: there are none, or they were made of other data or with another tokenizer.
    """

    def __init__(self, records: Records, data_dir: str | os.PathLike, fingerprint: str):
        path = folder(records.dataset, data_dir)
        if not (path / _INFO).exists():
            raise UserError(
                f"no cached latents of {records.dataset} in {path}: {_AGAIN}, or let the step"
                " encode the pictures (config.input.max_encoded_images)"
            )
        self._start = records.start
        self._file = str(path / records.base)
        try:
            info = json.loads((path / _INFO).read_text())
            self._shape = (2, -1, info["image_tokens"], info["token_dim"])
            entries = array_record_module.ArrayRecordReader(self._file).num_records()
            wanted = {
                "version": (info["version"], records.version),
                "build (records, bytes)": (info["sizes"].get(records.base), list(records.size)),
                "number of records": (entries, records.size[0]),
                "choice of pictures": (info["images"], records.images),
                "image tokenizer": (info["tokenizer"][:12], fingerprint[:12]),
            }
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"the cached latents in {path} are damaged ({error}): {_AGAIN}"
            ) from error
        for what, (cached, now) in wanted.items():
            if cached != now:
                raise UserError(
                    f"the cached latents of {records.name} are of another {what}:"
                    f" {cached} cached, {now} in use: {_AGAIN}"
                )
        self._reader = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    def __getitem__(self, index: SupportsIndex) -> Float[np.ndarray, "2 images N C"]:
        """Raw mean and standard deviation of every picture of a record.

        Raises:
            ValueError: the entry is damaged.
        """
        if self._reader is None:
            # Opened where it is used: readers do not travel to worker processes.
            self._reader = array_record_module.ArrayRecordReader(
                self._file, options="readahead_buffer_size:0"
            )
        try:
            (entry,) = self._reader.read([self._start + int(index)])
            return np.frombuffer(entry, np.float16).reshape(self._shape).astype(np.float32)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"cached latents: {error}") from error
