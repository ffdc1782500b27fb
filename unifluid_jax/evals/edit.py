"""Editing: colour and shape judged from the pixels, and PSNR to the true target."""

import functools

import numpy as np

from unifluid_jax.evals import base
from unifluid_jax.evals.base import Outcome, Tile
from unifluid_jax.evals.judged import JudgedConfig, agreement
from unifluid_jax.image_tokenizer import psnr
from unifluid_jax.inference import Model
from unifluid_jax.input.examples import Example
from unifluid_jax.input.records import resized

Config = JudgedConfig
read = functools.partial(base.read, "edit")


def score(model: Model, examples: list[Example], c: Config) -> Outcome:
    """`psnr` (dB), and with `judge` the shares with the right `color`, `shape`, and `both`.

    The truth is the target picture itself. `psnr_limit` is what the image tokenizer alone would
    reach, encoding and decoding the target.
    """
    edited = model.edit([e.image for e in examples], [e.prompt for e in examples])
    edited = np.stack([np.asarray(picture) for picture in edited])
    size = edited.shape[1]
    targets = np.stack([resized(e.target, size) for e in examples])
    limit = model.parts.images.decode(model.parts.images.encode(targets)[0])
    scores = {
        "psnr": float(psnr(edited, targets).mean()),
        "psnr_limit": float(psnr(limit, targets).mean()),
    }
    if c.judge:
        scores = agreement(edited, targets) | scores
    tiles = [
        Tile(
            base.beside(resized(examples[i].image, size), edited[i], targets[i]),
            f"{examples[i].prompt} (source, edited, true)",
        )
        for i in base.shown(len(examples), c.pictures)
    ]
    return Outcome(scores, tiles, len(examples))
