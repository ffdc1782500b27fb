"""Sheets of pictures, each with its text under it."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from unifluid_jax.evals.base import Tile

_HEIGHT = 128  # pixels, about: small pictures are enlarged by a whole number
_GAP = 10
_LINE = 15
_TITLE = 26


def sheet(sections: Mapping[str, Sequence[Tile]], columns: int = 6) -> UInt8[np.ndarray, "_h _w 3"]:
    """Tiles in rows on white, the sections one below the other under their titles ("" for none)."""
    parts = [_section(title, tiles, columns) for title, tiles in sections.items() if tiles]
    width = max(part.width for part in parts)
    whole = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    y = 0
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height
    return np.asarray(whole)


def _section(title: str, tiles: Sequence[Tile], columns: int) -> Image.Image:
    font = ImageFont.load_default(size=12)
    pictures = [_enlarged(tile.picture) for tile in tiles]
    width = max(_HEIGHT, *(picture.width for picture in pictures))
    letters = int(width / font.getlength("n"))
    texts = ["\n".join(textwrap.wrap(tile.text, letters)) for tile in tiles]
    lines = max(text.count("\n") + 1 for text in texts)
    height = max(picture.height for picture in pictures) + _LINE * lines + _GAP
    columns = min(columns, len(tiles))
    top = _GAP + (_TITLE if title else 0)
    title_font = ImageFont.load_default(size=16)
    size = (
        _GAP + max((width + _GAP) * columns, math.ceil(title_font.getlength(title)) + _GAP),
        top + height * math.ceil(len(tiles) / columns),
    )
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.text((_GAP, _GAP), title, "black", title_font)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        x, y = _GAP + (i % columns) * (width + _GAP), top + (i // columns) * height
        image.paste(picture, (x, y))
        pen.text((x, y + picture.height + 2), text, "black", font, spacing=1)
    return image


def _enlarged(picture: UInt8[np.ndarray, "_h _w 3"]) -> Image.Image:
    factor = max(1, _HEIGHT // len(picture))
    image = Image.fromarray(picture)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
