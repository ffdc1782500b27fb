"""Zero-shot captions: which of all captions of the split goes best with a picture?"""

import functools

import numpy as np

from unifluid_jax.contrastive import Contrastive
from unifluid_jax.evals import base
from unifluid_jax.evals.base import EvalConfig, Outcome, Tile
from unifluid_jax.input.examples import Example
from unifluid_jax.input.records import resized

Config = EvalConfig
read = functools.partial(base.read, "caption")


def score(subject: Contrastive, examples: list[Example], c: Config) -> Outcome:
    """`accuracy`: share of the pictures whose best caption is their own.

    `captions`: how many different ones there were to choose from.
    """
    captions = sorted({example.answer for example in examples})
    images = np.stack([resized(example.image, subject.image_size) for example in examples])
    best = subject.logits(images, captions).argmax(axis=1)
    right = [captions[k] == example.answer for k, example in zip(best, examples, strict=True)]
    tiles = []
    for i in base.shown(len(examples), c.pictures):
        truth = "" if right[i] else f" (not {examples[i].answer})"
        tiles.append(Tile(images[i], f"{captions[best[i]]}{truth}"))
    scores = {"accuracy": sum(right) / len(right), "captions": float(len(captions))}
    return Outcome(scores, tiles, len(examples))
