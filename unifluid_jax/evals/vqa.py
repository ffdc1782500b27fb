"""Visual question answering: the share of answers that are exactly the expected one."""

import functools

from unifluid_jax.evals import base
from unifluid_jax.evals.base import EvalConfig, Outcome, Tile
from unifluid_jax.inference import Model
from unifluid_jax.input.examples import Example

Config = EvalConfig
read = functools.partial(base.read, "vqa")


def score(model: Model, examples: list[Example], c: Config) -> Outcome:
    """`accuracy`; case and blanks around an answer do not count."""
    answers = model.answer([e.image for e in examples], [e.prompt for e in examples])
    right = [
        answer.strip().lower() == example.answer.strip().lower()
        for answer, example in zip(answers, examples, strict=True)
    ]
    tiles = []
    for i in base.shown(len(examples), c.pictures):
        truth = "" if right[i] else f" (not {examples[i].answer})"
        tiles.append(Tile(examples[i].image, f"{examples[i].prompt} {answers[i]}{truth}"))
    return Outcome({"accuracy": sum(right) / len(right)}, tiles, len(examples))
