"""Exact judge of easy-vqa's pictures: which colour and which shape do the pixels show?

Easy-vqa draws one antialiased, axis-aligned shape of one of eight pure colours on a flat pale
background, so every pixel is `background + alpha * (colour - background)`. The judge inverts
that: the background from the border, the colour as the nearest of the palette, alpha by
projection; then it draws the circle, the rectangle and the triangle that have the area and the
moments of alpha, as unsharp as alpha is (up to a pixel), and takes the one that overlaps best.
What overlaps none of them well has no shape. (Our choice; data/easy_vqa/README.md has the
measured accuracy.)

Letters: H W pixels.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Shaped
from scipy import ndimage

PALETTE = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle")

# A pixel belongs to the foreground when a channel is this far from the background (0-255). The
# closest pair, gray on the darkest background easy-vqa draws, is 102 apart; the image tokenizer's
# ringing stays below 40.
_FOREGROUND = 48.0
# The median foreground colour may be this far from a palette colour (Euclidean, 0-255); the
# closest two colours, red and brown, are 108 apart.
_COLOR_RADIUS = 60.0
_MIN_AREA = 9  # pixels of foreground below which nothing is judged: a 4 px circle has 13
_MIN_PURITY = 0.6  # share of the core's pixels that agree on the colour
_MIN_DOMINANCE = 0.85  # share of the foreground in its largest connected piece
# Soft intersection over union with the ideal shape: 0.82 for a half circle, >= 0.92 for real ones.
_MIN_OVERLAP = 0.85
_MAX_BLUR = 1.0  # pixels: more than this (standard deviation) is not an unsharp shape but a blob
_SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a picture shows.

    Attributes:
        color: of the foreground; None when there is no foreground or it has no one colour.
        shape: None when the foreground is not one clear circle, rectangle or upright triangle.
        overlap: soft intersection over union of the foreground with the ideal shape, 0-1.
        center: (y, x) of the foreground in pixels, (0, 0) is the upper left corner of the picture.
        size: (height, width) of the fitted shape in pixels.
    """

    color: str | None
    shape: str | None
    overlap: float = 0.0
    center: tuple[float, float] = (0.0, 0.0)
    size: tuple[float, float] = (0.0, 0.0)


def judge(image_HWC: Shaped[np.ndarray, "H W 3"]) -> Judgement:
    """Judges one picture: uint8, or float in [-1, 1] as the image tokenizer decodes it."""
    pixels_HWC = to_255(image_HWC)
    background = background_color(pixels_HWC)
    difference_HW = np.abs(pixels_HWC - background).max(-1)
    foreground_HW = difference_HW > _FOREGROUND
    if foreground_HW.sum() < _MIN_AREA:
        return Judgement(color=None, shape=None)
    color = _color(pixels_HWC, difference_HW, foreground_HW)
    if color is None:
        return Judgement(color=None, shape=None)
    pieces_HW, count = ndimage.label(foreground_HW, structure=np.ones((3, 3)))
    areas = ndimage.sum_labels(foreground_HW, pieces_HW, np.arange(1, count + 1))
    if areas.max() < _MIN_DOMINANCE * foreground_HW.sum():
        return Judgement(color=color, shape=None)
    alpha_HW = coverage(pixels_HWC, background, np.asarray(PALETTE[color], np.float32))
    # The shape's rim is fainter than the foreground threshold; noise further away must not count.
    largest_HW = pieces_HW == 1 + areas.argmax()
    near_HW = ndimage.binary_dilation(largest_HW, np.ones((3, 3)), iterations=2)
    return _shape(np.where(near_HW, alpha_HW, 0.0), color)


def to_255(image_HWC: Shaped[np.ndarray, "H W 3"]) -> Float[np.ndarray, "H W 3"]:
    """Pixels on the scale 0-255, float32, from uint8 or from float in [-1, 1]."""
    image_HWC = np.asarray(image_HWC)
    if image_HWC.dtype == np.uint8:
        return image_HWC.astype(np.float32)
    return np.clip((image_HWC.astype(np.float32) + 1.0) * 127.5, 0.0, 255.0)


def background_color(pixels_HWC: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "3"]:
    """The background's colour: the median of the border."""
    border = [pixels_HWC[0], pixels_HWC[-1], pixels_HWC[1:-1, 0], pixels_HWC[1:-1, -1]]
    return np.median(np.concatenate(border), axis=0)


def coverage(
    pixels_HWC: Float[np.ndarray, "H W 3"],
    background: Float[np.ndarray, "3"],
    foreground: Float[np.ndarray, "3"],
) -> Float[np.ndarray, "H W"]:
    """Alpha in [0, 1], least squares: `pixel = background + alpha * (foreground - background)`."""
    span = foreground - background
    return np.clip((pixels_HWC - background) @ span / (span @ span), 0.0, 1.0)


def _color(pixels_HWC, difference_HW, foreground_HW) -> str | None:
    """The palette colour on which the core of the foreground agrees, or None."""
    # The core: what stands out nearly as much as the most outstanding pixels; the antialiased rim
    # mixes in background.
    outstanding = np.quantile(difference_HW[foreground_HW], 0.9)
    core_HW = foreground_HW & (difference_HW >= 0.8 * outstanding)
    names, colors = list(PALETTE), np.asarray(list(PALETTE.values()), np.float32)
    distance = np.linalg.norm(pixels_HWC[core_HW][:, None] - colors[None], axis=-1)
    votes = np.bincount(distance.argmin(1), minlength=len(names))
    best = int(votes.argmax())
    if votes[best] < _MIN_PURITY * votes.sum():
        return None
    median = np.median(pixels_HWC[core_HW], axis=0)
    return names[best] if np.linalg.norm(median - colors[best]) <= _COLOR_RADIUS else None


def _shape(alpha_HW, color: str) -> Judgement:
    """The ideal shape with the area and the moments of alpha that overlaps it best."""
    height, width = alpha_HW.shape
    area = float(alpha_HW.sum())
    ys, xs = np.arange(height) + 0.5, np.arange(width) + 0.5
    y, x = float(alpha_HW.sum(1) @ ys) / area, float(alpha_HW.sum(0) @ xs) / area
    var_y = float(alpha_HW.sum(1) @ (ys - y) ** 2) / area
    var_x = float(alpha_HW.sum(0) @ (xs - x) ** 2) / area
    best = Judgement(color=color, shape=None, center=(y, x))
    for shape in SHAPES:
        size, blur = _fit(shape, area, var_y, var_x)
        ideal_HW = ndimage.gaussian_filter(draw(shape, (y, x), size, (height, width)), blur)
        overlap = float(np.minimum(alpha_HW, ideal_HW).sum() / np.maximum(alpha_HW, ideal_HW).sum())
        if overlap > best.overlap:
            best = Judgement(color, shape, overlap, (y, x), size)
    return best if best.overlap >= _MIN_OVERLAP else dataclasses.replace(best, shape=None)


def _fit(shape: str, area: float, var_y: float, var_x: float) -> tuple[tuple[float, float], float]:
    """Size (height, width) of the shape of this area, and the blur that its moments betray.

    A Gaussian blur keeps the area and adds its variance b to both moments. Without blur the
    moments of a shape fix its area: var_y * var_x = (area / k)^2. So (var_y - b) * (var_x - b) =
    (area / k)^2 gives b.
    """
    # k from the variances side^2 / 12 (rectangle), radius^2 / 4 (circle), height^2 / 18 and
    # base^2 / 24 (triangle).
    k = {"circle": 4 * np.pi, "rectangle": 12.0, "triangle": np.sqrt(108.0)}[shape]
    mean, half_difference = (var_y + var_x) / 2, (var_y - var_x) / 2
    if shape == "circle":
        half_difference = 0.0
    b = mean - float(np.hypot(half_difference, area / k))
    b = min(max(b, 0.0), _MAX_BLUR**2, 0.5 * var_y, 0.5 * var_x)
    if shape == "circle":
        height = width = float(np.sqrt(4 * area / np.pi))
    elif shape == "rectangle":
        height = float(np.sqrt(area * np.sqrt((var_y - b) / (var_x - b))))
        width = area / height
    else:
        height = float(np.sqrt(2 * area * np.sqrt(18 * (var_y - b) / (24 * (var_x - b)))))
        width = 2 * area / height
    return (height, width), float(np.sqrt(b))


def draw(
    shape: str, center: tuple[float, float], size: tuple[float, float], canvas: tuple[int, int]
) -> Float[np.ndarray, "H W"]:
    """Antialiased alpha of a shape of this centroid (y, x) and size (height, width) in pixels."""
    s = _SUPERSAMPLING
    y = ((np.arange(canvas[0] * s) + 0.5) / s - center[0])[:, None]
    x = ((np.arange(canvas[1] * s) + 0.5) / s - center[1])[None, :]
    height, width = size
    if shape == "circle":
        inside = (y / height) ** 2 + (x / width) ** 2 <= 0.25
    elif shape == "rectangle":
        inside = (np.abs(y) <= height / 2) & (np.abs(x) <= width / 2)
    elif shape == "triangle":
        below_tip = y / height + 2 / 3  # 0 at the tip, 1 at the base
        inside = (below_tip >= 0) & (below_tip <= 1) & (np.abs(x) <= below_tip * width / 2)
    else:
        raise ValueError(f"shape {shape!r} is none of {SHAPES}")
    return inside.reshape(canvas[0], s, canvas[1], s).mean((1, 3), dtype=np.float32)
