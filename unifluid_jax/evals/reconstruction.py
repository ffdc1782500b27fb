"""Reconstruction by the image tokenizer: PSNR of pictures encoded and decoded."""

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from unifluid_jax.errors import UserError
from unifluid_jax.evals import base
from unifluid_jax.evals.base import EvalConfig, Outcome, Tile
from unifluid_jax.image_tokenizer import ImageTokenizer, psnr
from unifluid_jax.inference import Model
from unifluid_jax.input.records import Records, resized

Config = EvalConfig


def read(config: ConfigDict, c: Config) -> list[UInt8[np.ndarray, "_h _w 3"]]:
    """The first picture of each record, of `limit` records spread evenly over the split."""
    records = Records(c.dataset, c.split, config.data_dir, c.fields)
    pictures = []
    for i in base.shown(len(records), c.limit or len(records)):
        try:
            pictures.append(records[i].image(0))
        except ValueError as error:
            raise UserError(
                f"{records.name} record {i} is corrupt ({error}): build the data set anew"
            ) from error
    return pictures


def score(
    subject: ImageTokenizer | Model, pictures: list[UInt8[np.ndarray, "_h _w 3"]], c: Config
) -> Outcome:
    """`psnr`, dB, mean over pictures."""
    tokenizer = subject.parts.images if isinstance(subject, Model) else subject
    images = np.stack([resized(picture, tokenizer.config.image_size) for picture in pictures])
    decoded = tokenizer.decode(tokenizer.encode(images)[0])
    found = psnr(decoded, images)
    tiles = [
        Tile(base.beside(images[i], decoded[i]), f"{found[i]:.1f} dB")
        for i in base.shown(len(images), c.pictures)
    ]
    return Outcome({"psnr": float(found.mean())}, tiles, len(images))
