"""Text-to-image: colour and shape of what was drawn, judged from the pixels."""

import functools

import numpy as np

from unifluid_jax.evals import base
from unifluid_jax.evals.base import Outcome, Tile
from unifluid_jax.evals.judged import JudgedConfig, agreement
from unifluid_jax.inference import Model
from unifluid_jax.input.examples import Example

Config = JudgedConfig
read = functools.partial(base.read, "generate")


def score(model: Model, examples: list[Example], c: Config) -> Outcome:
    """With `judge`, the shares of pictures with the right `color`, `shape`, and `both`.

    Right is what the judge sees in the picture that the prompt is the caption of.
    """
    pictures = [np.asarray(p) for p in model.generate([e.prompt for e in examples])]
    scores = {}
    if c.judge:
        scores = agreement(pictures, [e.target for e in examples])
    tiles = [Tile(pictures[i], examples[i].prompt) for i in base.shown(len(examples), c.pictures)]
    return Outcome(scores, tiles, len(examples))
