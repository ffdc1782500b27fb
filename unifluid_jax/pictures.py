"""Pictures as users have them, to arrays; masks to grid cells; half-made pictures to be shown."""

import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps

from unifluid_jax.errors import UserError
from unifluid_jax.input.records import resized

Picture = Image.Image | str | os.PathLike | np.ndarray

_UNKNOWN = (225, 200)  # greys of the checks that stand where nothing is drawn yet


def to_array(picture: Picture) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as RGB: turned as its EXIF data says, transparency over white, grey as grey.

    Raises:
        UserError: the file cannot be read, or the array is no picture.
    """
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    try:
        if isinstance(picture, Image.Image):
            return _rgb(picture)
        with Image.open(picture) as opened:
            return _rgb(opened)
    except FileNotFoundError:
        raise UserError(f'no picture "{picture}": no such file') from None
    except UserError:
        raise
    except Exception as error:
        # Pillow raises many kinds over damaged files, an opened one is read only here: OSError,
        # SyntaxError, zlib.error.
        name = "a picture" if isinstance(picture, Image.Image) else f'"{picture}"'
        reason = " ".join(str(error).split())
        raise UserError(f"{name} cannot be read as a picture: {reason}") from error


def _from_array(x: np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    channels = x.shape[2] if x.ndim == 3 else 1
    if x.dtype != np.uint8 or x.ndim not in (2, 3) or channels not in (1, 3, 4) or not x.size:
        raise UserError(
            f"an array of {x.dtype} {list(x.shape)} is no picture: give uint8 [height, width] or"
            " [height, width, 1, 3 or 4], values 0 to 255"
        )
    return _rgb(Image.fromarray(x[..., 0] if x.ndim == 3 and channels == 1 else x))


def _rgb(picture: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    if picture.mode.startswith(("I", "F")):
        raise UserError(f"a picture of mode {picture.mode} has more than 8 bits: convert it to RGB")
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(picture.convert("RGB"))


def to_arrays(images: Picture | Sequence[Picture]) -> list[UInt8[np.ndarray, "H W 3"]]:
    """One picture or several, as a list.

    Raises:
        UserError: as `to_array`.
    """
    several = isinstance(images, Sequence) and not isinstance(images, str)
    several |= isinstance(images, np.ndarray) and images.ndim == 4
    return [to_array(image) for image in (images if several else [images])]


def to_cells(mask: Picture, size: int, side: int) -> Bool[np.ndarray, "N"]:
    """The grid cells that a mask touches, in raster order.

    Args:
        mask: a picture, white where to draw anew, or a bool array; resized as its picture is.
        size: side of the model's pictures, pixels.
        side: cells in a row of the grid.

    Raises:
        UserError: it cannot be read, it touches nothing, or it leaves nothing.
    """
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = mask.astype(np.uint8) * 255
    # The mean of a pixel's channels; any part of a cell that is more white than black counts.
    white = resized(to_array(mask), size).mean(axis=2) >= 128
    cells = white.reshape(side, size // side, side, size // side).any(axis=(1, 3)).reshape(-1)
    if not cells.any():
        raise UserError("the mask is black everywhere: make white what is to be drawn anew")
    if cells.all():
        raise UserError(
            "the mask is white everywhere: leave black what is to be kept, or use generate"
        )
    return cells


def painted(
    pixels: UInt8[np.ndarray, "S S 3"],
    cells: Bool[np.ndarray, "N"],
    other: UInt8[np.ndarray, "S S 3"] | None = None,
) -> UInt8[np.ndarray, "S S 3"]:
    """A picture with some grid cells taken from another, by default grey checks: "not yet"."""
    size, side = len(pixels), round(len(cells) ** 0.5)
    if other is None:
        check = np.indices((size, size)).sum(axis=0) // max(1, size // (4 * side)) % 2
        other = np.repeat(np.array(_UNKNOWN, np.uint8)[check][:, :, None], 3, axis=2)
    block = np.ones((size // side, size // side), bool)
    mask = np.kron(cells.reshape(side, side), block)
    return np.where(mask[:, :, None], other, pixels)
