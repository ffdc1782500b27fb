"""What the scores of pictures judged from their pixels share."""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import UInt8

from unifluid_jax.errors import UserError
from unifluid_jax.evals import shapes
from unifluid_jax.evals.base import EvalConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedConfig(EvalConfig):
    """For pictures that the model makes.

    Attributes:
        judge: judge colour and shape from the pixels; only pictures drawn as easy-vqa draws them
            can be judged.
    """

    judge: bool


def agreement(
    pictures: Iterable[UInt8[np.ndarray, "_h _w 3"]], truths: Iterable[UInt8[np.ndarray, "_H _W 3"]]
) -> dict[str, float]:
    """The shares of pictures that show the `color`, the `shape`, and `both` of their true picture.

    Raises:
        UserError: a true picture shows no clear colour and shape.
    """
    color, shape = [], []
    for picture, truth in zip(pictures, truths, strict=True):
        seen, wanted = shapes.judge(picture), shapes.judge(truth)
        if wanted.color is None or wanted.shape is None:
            raise UserError("no clear colour and shape in a true picture: set judge=False")
        color.append(seen.color == wanted.color)
        shape.append(seen.shape == wanted.shape)
    both = np.logical_and(color, shape)
    return {
        name: float(np.mean(x))
        for name, x in zip(("color", "shape", "both"), (color, shape, both), strict=True)
    }
