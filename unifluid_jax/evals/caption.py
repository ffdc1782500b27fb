"""Captions: the share that is exactly a reference, and CIDEr.

CIDEr is computed by `pycocoevalcap` on lower-case words, its own tokenizer being a Java program.
Its scale is the library's (10 at most); papers print 100 times that. It depends on the pictures
it is computed over: n-grams that many of them share weigh little.
"""

import dataclasses
import functools
import re
from typing import Any

import numpy as np

from unifluid_jax.errors import UserError
from unifluid_jax.evals import base
from unifluid_jax.evals.base import EvalConfig, Outcome, Tile
from unifluid_jax.inference import Model
from unifluid_jax.input.examples import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(EvalConfig):
    """Refused at once where its score cannot be computed, not after hours of training.

    Raises:
        UserError: the package that computes CIDEr is not installed.
    """

    def __post_init__(self):
        _scorer()


read = functools.partial(base.read, "caption")


def score(model: Model, examples: list[Example], c: Config) -> Outcome:
    """`exact` (case and punctuation do not count) and `cider`, each picture captioned once."""
    images, references = _by_picture(examples)
    captions = model.caption(images)
    exact = [
        words(caption) in map(words, truths)
        for caption, truths in zip(captions, references, strict=True)
    ]
    tiles = []
    for i in base.shown(len(images), c.pictures):
        truth = "" if exact[i] else f" (not {references[i][0]})"
        tiles.append(Tile(images[i], f"{captions[i]}{truth}"))
    scores = {"exact": sum(exact) / len(exact), "cider": cider(captions, references)}
    return Outcome(scores, tiles, len(images))


def words(text: str) -> str:
    """Lower-case words with single blanks between them."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def cider(captions: list[str], references: list[list[str]]) -> float:
    """CIDEr of one caption per picture, against one reference or more each.

    Raises:
        UserError: the package that computes it is not installed.
    """
    scorer = _scorer()
    for caption, truths in zip(captions, references, strict=True):
        scorer += (words(caption), [words(truth) for truth in truths])
    return float(scorer.compute_score()[0])


def _scorer() -> Any:
    try:
        from pycocoevalcap.cider.cider_scorer import CiderScorer
    except ImportError:
        raise UserError(
            "CIDEr needs the package pycocoevalcap: pip install 'unifluid_jax[eval]'"
        ) from None
    return CiderScorer()


def _by_picture(examples: list[Example]) -> tuple[list[np.ndarray], list[list[str]]]:
    """The different pictures among the examples, and all captions that their records have."""
    images, references, seen = [], [], set()
    for example in examples:
        record = example.record
        (index, *_) = [
            i
            for i, text in record.captions
            if text == example.answer and np.array_equal(record.image(i), example.image)
        ]
        if (record.id, index) not in seen:
            seen.add((record.id, index))
            images.append(example.image)
            references.append([text for i, text in record.captions if i == index])
    return images, references
