"""A packed batch for the eye: its sequences as text, its pictures as a grid."""

import dataclasses
import itertools
import math
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table

from unifluid_jax.input.pipeline import FIELDS, Batch
from unifluid_jax.input.records import resized
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.sequence import Layout, Modality, latent_index

if TYPE_CHECKING:
    from unifluid_jax.image_tokenizer import ImageTokenizer


@dataclasses.dataclass(frozen=True)
class Segment:
    """One example as it lies in a packed batch.

    Attributes:
        row, start: where its first position is.
        number: of the segment in its row, from 1.
        entry, record: mixture entry and record index that it was made of.
        fields: its part of the arrays that have one entry per position.
        images: its pictures for the vision tower.
    """

    row: int
    start: int
    number: int
    entry: int
    record: int
    fields: Mapping[str, np.ndarray]
    images: UInt8[np.ndarray, "n H W 3"]

    def __len__(self) -> int:
        return len(self.fields["tokens"])


def segments(batch: Batch, layout: Layout) -> Iterator[Segment]:
    """The examples of a batch, row by row."""
    for row, segment_L in enumerate(batch["segment"]):
        images = 0
        for number in range(1, segment_L.max() + 1):
            (at,) = np.nonzero(segment_L == number)
            fields = {name: batch[name][row, at] for name in FIELDS if name in batch}
            seen = np.count_nonzero(fields["modality"] == Modality.VISION) // layout.vision_tokens
            entry, record = batch["example_id"][row, number - 1].tolist()
            pictures = batch["images"][row, images : images + seen]
            yield Segment(row, int(at[0]), number, entry, record, fields, pictures)
            images += seen


def lines(segment: Segment, tokenizer: TextTokenizer) -> Iterator[str]:
    """A segment in words: runs of positions of one kind, what they are fed and what they predict.

    Text is shown in pieces, image tokens by their grid cells; "a > b" is fed a and predicts b. What
    is in brackets is one causal step: its positions see each other.
    """
    kinds = [_kind(segment.fields, i) for i in range(len(segment))]
    for kind, run in itertools.groupby(range(len(segment)), key=lambda i: kinds[i]):
        run = list(run)
        positions, step = segment.fields["position"][run], segment.fields["step"][run]
        starts = np.flatnonzero(step) if kind == "image" else [0]
        words = []
        for start, end in itertools.pairwise([*starts, len(run)]):
            words.append(_words(kind, segment.fields, run[start:end], tokenizer))
            if end - start > 1 and not step[start + 1 : end].any():
                words[-1] = f"[{words[-1]}]"
        yield f"{positions[0]:>5}-{positions[-1]:<4} {kind:<8} {', '.join(words)}"


def _kind(fields: Mapping[str, np.ndarray], i: int) -> str:
    if fields["target_position"][i] >= 0:
        return "image"
    if fields["modality"][i] == Modality.TEXT:
        return "answer" if fields["text_weight"][i] > 0 else "text"
    return "vision" if fields["modality"][i] == Modality.VISION else "source"


def _words(
    kind: str, fields: Mapping[str, np.ndarray], run: Sequence[int], tokenizer: TextTokenizer
) -> str:
    if kind == "vision":
        return f"tokens 0-{len(run) - 1} of the picture"
    if kind == "source":
        return "latents of cells " + " ".join(map(str, fields["content_position"][run]))
    words = []
    for i in run:
        cell = fields["content_position"][i]
        fed = str(cell) if cell >= 0 else _piece(tokenizer, fields["tokens"][i])
        weight = 0.0
        if kind == "answer":
            weight, target = fields["text_weight"][i], _piece(tokenizer, fields["text_target"][i])
        if kind == "image":
            weight, target = fields["image_weight"][i], str(fields["target_position"][i])
        words.append(fed if kind == "text" else f"{fed} > {target}".strip())
        if kind != "text" and weight != 1.0:
            words[-1] += f" (weight {weight:g})"
    return " ".join(words) if kind == "text" else ", ".join(words)


def _piece(tokenizer: TextTokenizer, index: SupportsIndex) -> str:
    return tokenizer.piece(index).replace("\n", "\\n")


def text(segment: Segment, tokenizer: TextTokenizer) -> str:
    """Prompt and answer as a reader would write them."""
    fields = segment.fields
    is_text = fields["modality"] == Modality.TEXT
    prompt = fields["tokens"][is_text & (fields["text_weight"] == 0)]
    words = "(text dropped)" if (prompt == tokenizer.null).any() else tokenizer.decode(prompt)
    answer = fields["text_target"][fields["text_weight"] > 0]
    return f"{words} > {tokenizer.decode(answer)}" if len(answer) else words


def fill(batch: Batch, input_config: ConfigDict, layout: Layout) -> Table:
    """How full the rows are: positions by modality, and every cap of the packing."""
    rows, length = batch["segment"].shape
    table = Table("", "in a row", "of", "share", box=None)
    for modality in Modality:
        count = np.count_nonzero(batch["modality"] == modality) / rows
        name = f"{modality.name.lower()} positions"
        table.add_row(name, f"{count:.1f}", str(length), f"{count / length:.1%}")
    vision = np.count_nonzero(batch["modality"] == Modality.VISION) / layout.vision_tokens
    used = {
        "max_images": vision,
        "max_text_targets": np.count_nonzero(batch["text_weight"]),
        "max_image_targets": np.count_nonzero(batch["image_weight"]),
    }
    if "pictures" in batch:
        kept = latent_index(batch, layout.image_tokens) >= 0
        used["max_encoded_images"] = np.count_nonzero(kept) / layout.image_tokens
    for name, count in used.items():
        cap = input_config[name]
        share = f"{count / rows / cap:.1%}" if cap else "-"
        table.add_row(name, f"{count / rows:.1f}", str(cap), share)
    return table


def proportions(found: Iterable[Segment], entries: Sequence[Mapping[str, Any]]) -> Table:
    """Examples of each mixture entry, beside what the config asks for."""
    counts = np.bincount([segment.entry for segment in found], minlength=len(entries))
    weights = np.array([entry["weight"] for entry in entries])
    table = Table("task", "data", "examples", "share", "configured", box=None)
    for entry, count, weight in zip(entries, counts, weights / weights.sum(), strict=True):
        share = f"{count / counts.sum():.1%}"
        name = f"{entry['dataset']}/{entry['split']}"
        table.add_row(entry["task"], name, str(count), share, f"{weight:.1%}")
    return table


def draw(
    found: Sequence[Segment],
    entries: Sequence[Mapping[str, Any]],
    text_tokenizer: TextTokenizer,
    images: "ImageTokenizer",
    path: str | os.PathLike,
) -> None:
    """Writes a PNG: of each example the picture seen, the source's latents and the target, decoded.

    Latents are decoded at the posterior's mean.
    """
    tokens = [t for segment in found for t in _tokens(segment)]
    decoded = iter(images.pictures(np.stack(tokens)) if tokens else ())
    size = images.config.image_size
    strips, labels = [], []
    for segment in found:
        pictures = [resized(image, size) for image in segment.images]
        names = ["seen"] * len(pictures)
        for kind in _latent_kinds(segment):
            pictures.append(next(decoded))
            names.append("target" if kind == "image" else kind)
        strips.append(_beside(pictures))
        task = entries[segment.entry]["task"]
        labels.append((f"{task}: {' | '.join(names)}", text(segment, text_tokenizer)))
    grid(strips, labels, path)


def _latent_kinds(segment: Segment) -> list[str]:
    kinds = [_kind(segment.fields, i) for i in range(len(segment))]
    return [kind for kind in ("source", "image") if kind in kinds]


def _tokens(segment: Segment) -> Iterator[Float[np.ndarray, "N C"]]:
    """The model's tokens in raster order of the source, if there is one, and of the target."""
    fields = segment.fields
    kinds = np.array([_kind(fields, i) for i in range(len(segment))])
    for kind in _latent_kinds(segment):
        place = fields["content_position" if kind == "source" else "target_position"]
        at = (kinds == kind) & (place >= 0)
        cells = place[at]
        raster = np.empty_like(fields["latent_mean"][at])
        raster[cells] = fields["latent_mean"][at]
        yield raster


def _beside(pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> UInt8[np.ndarray, "H W2 3"]:
    gap = np.full((len(pictures[0]), 4, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def grid(
    pictures: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    labels: Sequence[tuple[str, str]],
    path: str | os.PathLike,
    columns: int = 6,
) -> None:
    """Writes pictures as one PNG on white, each with a line above and text below.

    Small pictures are enlarged to a height of about 128 pixels.
    """
    scale = max(1, 128 // max(len(picture) for picture in pictures))
    pictures = [picture.repeat(scale, axis=0).repeat(scale, axis=1) for picture in pictures]
    width = max(150, *(picture.shape[1] for picture in pictures))
    font = ImageFont.load_default(size=12)
    letters = int(width / font.getlength("n"))
    texts = [textwrap.wrap(below, letters) for _, below in labels]
    line = 15
    above = line if any(title for title, _ in labels) else 0
    height = above + max(map(len, pictures)) + line * max(map(len, texts)) + 12
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", ((width + 16) * min(columns, len(pictures)), height * rows), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, (title, _), words) in enumerate(zip(pictures, labels, texts, strict=True)):
        x, y = (i % columns) * (width + 16) + 8, (i // columns) * height
        pen.text((x, y), title, "gray", font)
        sheet.paste(Image.fromarray(picture), (x, y + above))
        pen.text((x, y + above + len(picture) + 2), "\n".join(words), "black", font, spacing=1)
    sheet.save(path, "PNG")
