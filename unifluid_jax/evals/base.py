"""What all scores share: their config, their examples, their outcome."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from unifluid_jax.input import pipeline
from unifluid_jax.input.examples import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Fields of an entry of `config.evals`.

    Attributes:
        type: which score.
        dataset, split: what to score on.
        limit: number of examples, drawn evenly from the split, always the same; 0 for all.
        every: training steps between two evaluations during training; 0 for none.
        pictures: number of examples to show.
        fields: of a foreign data set, as in `input/records.py`.
    """

    type: str
    dataset: str
    split: str
    limit: int
    every: int
    pictures: int
    fields: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Tile:
    """A picture with the text that belongs under it."""

    picture: UInt8[np.ndarray, "_h _w 3"]
    text: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a score found.

    Attributes:
        scores: by name.
        tiles: examples for the eye.
        count: number of examples scored.
        seconds: it took.
    """

    scores: dict[str, float]
    tiles: list[Tile]
    count: int
    seconds: float = 0.0


def read(task: str, config: ConfigDict, c: EvalConfig) -> list[Example]:
    """The examples of a task that an evaluation asks for."""
    examples = pipeline.eval_examples(config, task, c.dataset, c.split, c.limit or None, c.fields)
    return list(examples)


def shown(count: int, pictures: int) -> Sequence[int]:
    """Indices of the examples to show: evenly spread over all."""
    return np.unique(np.linspace(0, count - 1, min(pictures, count)).astype(int)).tolist()


def beside(*pictures: UInt8[np.ndarray, "_h _w 3"]) -> UInt8[np.ndarray, "_h2 _w2 3"]:
    """Pictures of one height side by side, with a white gap."""
    gap = np.full((len(pictures[0]), max(1, len(pictures[0]) // 16), 3), 255, np.uint8)
    return np.concatenate([part for p in pictures for part in (p, gap)][:-1], axis=1)
