"""Grain pipelines: mixtures of records to packed batches; plain pictures for image tokenizers.

Order of things: every entry of the mixture is shuffled, repeated, dealt to streams and mixed, all
by index; worker processes only map an index to an element, and Grain restores the order; what turns
out to be unusable travels as `Skipped` and is dropped in the main process, where packing and
batching happen. So the seed alone fixes the batches, whatever the number of workers, and a position
in them is one index a stream.

The global batch is made of `config.input.streams` equal parts, stream i giving the i-th. Every
stream reads and packs on its own, and a process opens those whose rows it holds. So the batches do
not depend on the number of processes either: it may change with every restart, up to one process a
stream.

Letters: L positions of a packed row, B rows, I pictures of a row, E examples of a row.
"""

import atexit
import dataclasses
import functools
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np
from absl import flags, logging
from grain import experimental as grain_experimental
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from unifluid_jax import sequence
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.input import examples
from unifluid_jax.input.examples import TASKS, Example, Sequencer, Unfit
from unifluid_jax.input.latents import LatentCache
from unifluid_jax.input.records import TASK_PARTS, Records, resized
from unifluid_jax.input.tokenizer import TextTokenizer

Batch = dict[str, np.ndarray]

# Fields of a packed batch that have one entry per position; latents are missing where the step
# encodes pictures.
FIELDS = tuple(
    f.name for f in dataclasses.fields(sequence.Sequence) if f.name not in sequence.PICTURES
)
_LATENTS = ("latent_mean", "latent_std")
# What padding holds: zero, but here.
_PADDING = {"content_position": -1, "target_position": -1, "example_id": -1}
# So many elements in a row without one to use: there is none, and the search would not end.
_VAIN = 10_000


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An element that cannot be used, on its way to be counted.

    Attributes:
        where: data set, split and record.
        reason: what is wrong with it.
        corrupt: the record cannot be read; else it only does not fit its task.
    """

    where: str
    reason: str
    corrupt: bool


def packed_batches(
    config: ConfigDict, sequencer: Sequencer, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Packed batches, endless.

    `get_state` gives {stream: position}; `set_state` takes these of all streams or of more than are
    needed here.

    Each batch is a dict: the fields of `sequence.Sequence` as [B, L, ...], `images` uint8
    [B, I, H, W, 3] and, in place of latents that the step is to make, `pictures` alike; `segment`
    [B, L] (1, 2, ... in a row, 0 for padding) and `example_id` [B, E, 2] (mixture entry and record
    index of the row's segments, in their order; -1 for none).

    A stream's part of a batch is a contiguous part of its mixture, so the tasks have the configured
    proportions.

    Args:
        rows: of the global batch, those that this process holds; all by default.

    Raises:
        UserError: the mixture is empty or names unknown data, an example can exceed a row, or the
            streams do not fit the rows; from the iterator: too many records are corrupt, or none
            can be used.
    """
    c = config.input
    lengths = {name: c.seq_len for name in FIELDS}
    if sequencer.encode_in_step:
        lengths = {name: size for name, size in lengths.items() if name not in _LATENTS}
        lengths["pictures"] = c.max_encoded_images
    lengths |= {
        "images": c.max_images,
        "example_id": max_examples(config, sequencer),
        "text_slots": c.max_text_targets,
        "image_slots": c.max_image_targets,
    }
    numbers, height = _streams(config, rows)
    made = {}
    for number in numbers:
        dataset = grain_experimental.BestFitPackIterDataset(
            sequences(config, sequencer, number, len(numbers)),
            length_struct=lengths,
            num_packing_bins=height,
            shuffle_bins=False,
            # All arrays of an example lie alike: segment ids of one of them will do.
            meta_features=[name for name in lengths if name != "tokens"],
            padding_struct={name: _PADDING.get(name, 0) for name in lengths},
        )
        made[number] = iter(dataset.batch(height).map(_finished))
    return _Ahead(_Joined(made))


def sequences(
    config: ConfigDict, sequencer: Sequencer, stream: int = 0, local: int = 1
) -> grain.IterDataset:
    """A stream's endless mixture before packing: of each example the arrays that are to be joined.

    Args:
        stream: which one of `config.input.streams`.
        local: how many of them this process reads, which share its workers.

    Raises:
        UserError: as `packed_batches`.
    """
    maps = []
    open_records = functools.cache(functools.partial(_open_records, config.data_dir))
    for number, entry in enumerate(mixture(config)):
        task = entry.get("task", "")
        if task not in TASKS:
            raise UserError(f'unknown task "{task}" in config.input.mixture{nearest(task, TASKS)}')
        for name, needed in sequencer.largest(task).items():
            if needed > config.input[name]:
                raise UserError(
                    f"an example of the task {task} takes up to {needed}, config.input.{name} is"
                    f" {config.input[name]}: raise it or lower config.input.max_prompt_tokens"
                )
        # One reader for all tasks of a split: it is read through once.
        records = open_records(entry["dataset"], entry["split"], json.dumps(entry.get("fields")))
        latents = None
        if task in ("generate", "edit") and not sequencer.encode_in_step:
            latents = LatentCache(records, config.data_dir, sequencer.fingerprint)
        to_sequence = _ToSequence(number, task, records, latents, sequencer)
        maps.append((records.with_task(task), to_sequence))
    return _elements(config, maps, stream, local)


def picture_batches(config: ConfigDict, rows: Sequence[int] | None = None) -> grain.DatasetIterator:
    """Batches {"images": uint8 [B, H, W, 3]} of random pictures of records, for an image tokenizer.

    Each record is drawn equally often, with one of its pictures at random. `config.input` has
    `image_size`; `flip`, whether to mirror half of the pictures; `shift`, by how many pixels at
    most to move them, the edge repeated. Rows and positions are those of `packed_batches`.

    Raises:
        UserError: the mixture is empty or names unknown data, or the streams do not fit the rows.
    """
    maps = []
    for entry in mixture(config):
        fields = json.dumps(entry.get("fields"))
        records = _open_records(config.data_dir, entry["dataset"], entry["split"], fields)
        maps.append((np.arange(len(records)), _ToPicture(records, config.input)))
    return _in_streams(config, maps, rows)


def captioned_batches(
    config: ConfigDict, text: TextTokenizer, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Batches of random pictures with a caption each: for a SigLIP.

    `images` uint8 [B, H, W, 3] and `tokens` int32 [B, T], the caption and EOS, cut or padded to
    `config.model.text.tokens`. `config.input`, rows and positions as for `picture_batches`.

    Raises:
        UserError: the mixture is empty, names unknown data, or has no captions; or the streams do
            not fit the rows.
    """
    maps = []
    for entry in mixture(config):
        fields = json.dumps(entry.get("fields"))
        records = _open_records(config.data_dir, entry["dataset"], entry["split"], fields)
        captioned = _ToCaptioned(records, config.input, text, config.model.text.tokens)
        maps.append((records.with_task("caption"), captioned))
    return _in_streams(config, maps, rows)


def mixture(config: ConfigDict) -> list[Mapping[str, Any]]:
    """The entries of `config.input.mixture` that take part; a weight of 0 switches one off.

    Raises:
        UserError: nothing takes part, or an entry is incomplete.
    """
    for entry in config.input.mixture:
        for name in ("dataset", "split", "weight"):
            if name not in entry:
                raise UserError(f'an entry of config.input.mixture lacks "{name}": {dict(entry)}')
        if entry["weight"] < 0:
            raise UserError(f"config.input.mixture: weight {entry['weight']} of {entry['dataset']}")
    entries = [entry for entry in config.input.mixture if entry["weight"] > 0]
    if not entries:
        raise UserError("config.input.mixture is empty: give at least one entry a weight above 0")
    return entries


def max_examples(config: ConfigDict, sequencer: Sequencer) -> int:
    """E: what a row of the shortest examples possible would hold."""
    layout = sequencer.layout
    # A picture, BOS, separator and two tokens; or BOS, one token, BOI and the rest of an image.
    shortest = min(layout.vision_tokens + 4, layout.image_tokens + 2)
    return config.input.seq_len // shortest


def eval_examples(
    config: ConfigDict,
    task: str,
    dataset: str,
    split: str,
    limit: int | None = None,
    fields: Mapping[str, str | Sequence[str]] | None = None,
) -> Iterator[Example]:
    """Examples of a split, each once and in order, pictures decoded.

    Args:
        limit: how many, drawn evenly from all with a fixed seed; None for all.

    Raises:
        UserError: the data set is not there, or one of its records is corrupt.
    """
    if task not in TASKS:
        raise UserError(f'unknown task "{task}"{nearest(task, TASKS)}')
    records = Records(dataset, split, config.data_dir, fields)
    index = 0
    try:
        chosen = []
        for index in range(len(records)):
            chosen += [(index, i) for i in range(len(getattr(records[index], TASK_PARTS[task])))]
        if limit is not None and limit < len(chosen):
            drawn = np.random.default_rng(0).choice(len(chosen), limit, replace=False)
            chosen = [chosen[i] for i in np.sort(drawn)]
        for index, choice in chosen:
            yield examples.take(task, records[index], choice)
    except ValueError as error:
        raise UserError(
            f"{records.name} record {index} is corrupt ({error}): build the data set anew"
        ) from error


class _ToSequence:
    """Maps a record index of one mixture entry to the arrays of a random example of it."""

    def __init__(
        self,
        entry: int,
        task: str,
        records: Records,
        latents: LatentCache | None,
        sequencer: Sequencer,
    ):
        self._entry, self._task = entry, task
        self._records, self._latents, self._sequencer = records, latents, sequencer
        sizes = {"images": sequencer.image_size, "pictures": sequencer.picture_size}
        self._none = {name: np.zeros((0, n, n, 3), np.uint8) for name, n in sizes.items()}
        self._left_out = _LATENTS if sequencer.encode_in_step else ("pictures",)

    def __call__(
        self, index: SupportsIndex, rng: np.random.Generator
    ) -> dict[str, np.ndarray] | Skipped:
        where = f"{self._records.name} record {index}"
        try:
            record = self._records[index]
            moments = None if self._latents is None else self._latents[index]
            example = examples.draw(self._task, record, moments, self._sequencer.scale, rng)
        except ValueError as error:
            return Skipped(where, str(error), corrupt=True)
        except Unfit as error:
            return Skipped(where, str(error), corrupt=False)
        try:
            arrays = dict(vars(self._sequencer.train(example, rng)))
        except Unfit as error:
            return Skipped(where, str(error), corrupt=False)
        for name in self._left_out:
            del arrays[name]
        # The packer wants to know the size of what is not there.
        arrays |= {n: none for n, none in self._none.items() if n in arrays and not len(arrays[n])}
        arrays["example_id"] = np.array([[self._entry, index]], np.int32)
        # Counted by the packer, so that no row has more targets than the heads have slots.
        arrays["text_slots"] = np.zeros(np.count_nonzero(arrays["text_weight"]), np.int8)
        arrays["image_slots"] = np.zeros(np.count_nonzero(arrays["image_weight"]), np.int8)
        return arrays


class _ToPicture:
    """Maps a record index to one of the record's pictures."""

    def __init__(self, records: Records, input_config: ConfigDict):
        self._records = records
        self._size = input_config.image_size
        self._flip, self._shift = input_config.flip, input_config.shift

    def __call__(
        self, index: SupportsIndex, rng: np.random.Generator
    ) -> dict[str, UInt8[np.ndarray, "H W 3"]] | Skipped:
        try:
            record = self._records[index]
            if not record.images:
                return Skipped(f"{self._records.name} record {index}", "no pictures", corrupt=False)
            image = record.image(int(rng.integers(len(record.images))))
        except ValueError as error:
            return Skipped(f"{self._records.name} record {index}", str(error), corrupt=True)
        return {"images": self._varied(image, rng)}

    def _varied(
        self, image: UInt8[np.ndarray, "_h _w 3"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "H W 3"]:
        """A picture resized, and mirrored and moved as the config allows."""
        image = resized(image, self._size)
        if self._flip and rng.random() < 0.5:
            image = image[:, ::-1]
        if self._shift:
            y, x = rng.integers(2 * self._shift + 1, size=2)
            padding = ((self._shift,) * 2, (self._shift,) * 2, (0, 0))
            image = np.pad(image, padding, mode="edge")[y : y + self._size, x : x + self._size]
        return np.ascontiguousarray(image)


class _ToCaptioned(_ToPicture):
    """Maps a record index to one of the record's captions and the picture it is about."""

    def __init__(
        self, records: Records, input_config: ConfigDict, text: TextTokenizer, tokens: int
    ):
        super().__init__(records, input_config)
        self._text, self._tokens = text, tokens

    def __call__(
        self, index: SupportsIndex, rng: np.random.Generator
    ) -> dict[str, np.ndarray] | Skipped:
        try:
            record = self._records[index]
            which, caption = record.captions[int(rng.integers(len(record.captions)))]
            image = self._varied(record.image(which), rng)
        except ValueError as error:
            return Skipped(f"{self._records.name} record {index}", str(error), corrupt=True)
        return {"images": image, "tokens": self._text.padded(caption, self._tokens)}


def _open_records(data_dir: str, dataset: str, split: str, fields: str) -> Records:
    return Records(dataset, split, data_dir, json.loads(fields))


def _streams(config: ConfigDict, rows: Sequence[int] | None) -> tuple[list[int], int]:
    """The streams whose rows these are, and the rows of one stream."""
    c = config.input
    if c.streams < 1 or c.batch_size % c.streams:
        raise UserError(
            f"config.input.batch_size={c.batch_size} rows do not divide among"
            f" config.input.streams={c.streams}"
        )
    height = c.batch_size // c.streams
    rows = range(c.batch_size) if rows is None else rows
    numbers = sorted({row // height for row in rows})
    if len(rows) != len(numbers) * height:
        raise UserError(
            f"this process holds {len(rows)} of {c.batch_size} rows, which is no whole number of"
            f" config.input.streams={c.streams}: set it to a multiple of the number of processes"
        )
    return numbers, height


def _in_streams(
    config: ConfigDict,
    maps: Sequence[tuple[Int[np.ndarray, "..."], Callable]],
    rows: Sequence[int] | None,
) -> grain.DatasetIterator:
    """Batches of elements that need no packing; see `_elements`."""
    numbers, height = _streams(config, rows)
    made = {i: iter(_elements(config, maps, i, len(numbers)).batch(height)) for i in numbers}
    return _Ahead(_Joined(made))


def _elements(
    config: ConfigDict,
    maps: Sequence[tuple[Int[np.ndarray, "..."], Callable]],
    stream: int,
    local: int,
) -> grain.IterDataset:
    """A stream's endless elements: for each entry, its record indices and what maps them."""
    parts, entries = [], mixture(config)
    for number, (indices, function) in enumerate(maps):
        if not len(indices):
            raise UserError(
                f"nothing for config.input.mixture's {dict(entries[number])}: remove it"
            )
        seed = int(np.random.SeedSequence((config.seed, number)).generate_state(1)[0])
        part = grain.MapDataset.source(indices).seed(seed).shuffle().repeat().random_map(function)
        # Dealt before mixing: a stride over the mixture could leave a stream without some task.
        parts.append(part[stream :: config.input.streams])
    mixed = grain.MapDataset.mix(parts, weights=[float(entry["weight"]) for entry in entries])
    workers = -(-config.input.workers // local)  # rounded up: none is left without
    return _Usable(mixed, workers, config.input.max_corrupt)


class _Usable(grain.IterDataset):
    """The elements of a map-style data set, in order, without the `Skipped` ones.

    Args:
        workers: processes that make the elements; 0 to make them in the calling thread.
        max_corrupt: different corrupt records to put up with.
    """

    def __init__(self, elements: grain.MapDataset, workers: int, max_corrupt: int):
        super().__init__()
        self._elements, self._workers, self._max_corrupt = elements, workers, max_corrupt

    def __iter__(self) -> grain.DatasetIterator:
        return _UsableIterator(self._elements, self._workers, self._max_corrupt)


class _UsableIterator(grain.DatasetIterator):
    """Its state is the next index, and what has been skipped so far; it knows of no workers."""

    def __init__(self, elements: grain.MapDataset, workers: int, max_corrupt: int):
        super().__init__()
        self._elements, self._workers, self._max_corrupt = elements, workers, max_corrupt
        self._next, self._unfit = 0, 0
        self._corrupt: tuple[str, ...] = ()
        self._stream: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        if self._stream is None:
            # Opened at the index where it is to go on: workers need no state of their own.
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            dataset = self._elements[self._next :].to_iter_dataset(options)
            if self._workers:
                if not flags.FLAGS.is_parsed():
                    flags.FLAGS.mark_as_parsed()  # Grain reads flags of its own, in notebooks too
                workers = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=64)
                dataset = dataset.mp_prefetch(workers)
            self._stream = iter(dataset)
        for _ in range(_VAIN):
            element = next(self._stream)
            self._next += 1
            if not isinstance(element, Skipped):
                return element
            self._count(element)
        raise UserError(
            f"nothing of config.input.mixture can be used, {_VAIN} examples in a row; the last was"
            f" {element.where}: {element.reason}"
        )

    def _count(self, element: Skipped) -> None:
        if not element.corrupt:
            self._unfit += 1
            # 1, 2, 4, 8, ...: to be heard of, not to fill the screen.
            if self._unfit & (self._unfit - 1) == 0:
                logging.warning(
                    "passed over %s: %s (number %d)", element.where, element.reason, self._unfit
                )
            return
        if element.where in self._corrupt:
            return
        self._corrupt += (element.where,)
        count = len(self._corrupt)
        if count > self._max_corrupt:
            raise UserError(
                f"{element.where} is corrupt ({element.reason}): {count} such records, more than"
                f" config.input.max_corrupt={self._max_corrupt}; build the data set anew"
                " or raise the limit"
            )
        logging.warning(
            "skipped %s, which is corrupt (%s): %d of at most %d",
            *(element.where, element.reason, count, self._max_corrupt),
        )

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, "corrupt": list(self._corrupt), "unfit": self._unfit}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._unfit = state["next"], state["unfit"]
        self._corrupt = tuple(state["corrupt"])
        self._close_stream()

    def close(self) -> None:
        self._close_stream()
        super().close()

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None


class _Joined(grain.DatasetIterator):
    """The rows of some streams, one below the other."""

    def __init__(self, streams: Mapping[int, grain.DatasetIterator]):
        super().__init__()
        self._streams = streams

    def __next__(self) -> Batch:
        parts = [next(stream) for stream in self._streams.values()]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, stream in self._streams.items():
            stream.set_state(state[str(number)])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        super().close()


class _Ahead(grain_experimental.ThreadPrefetchDatasetIterator):
    """Batches, two of them made ahead by a thread that ends before the interpreter does."""

    def __init__(self, batches: grain.DatasetIterator):
        super().__init__(batches, prefetch_buffer_size=2)
        # Grain closes in `__del__`, too late at the interpreter's end: the process would abort.
        reference = weakref.ref(self)
        atexit.register(lambda: (found := reference()) is not None and found.close())

    def close(self) -> None:
        if not self._closed:
            super().close()


def _finished(batch: Batch) -> Batch:
    """The packer's names changed to ours, and what only it needed left out."""
    batch["segment"] = batch["tokens_segment_ids"]
    extra = ("tokens_segment_ids", "tokens_positions", "text_slots", "image_slots")
    return {name: array for name, array in batch.items() if name not in extra}
