"""Scores, one file each, declared in the config:

    config.evals.vqa = {"type": "vqa", "dataset": "easy_vqa", "split": "test", "limit": 1000,
                        "every": 0, "pictures": 12}

`type` is a key of `TYPES`, the other fields are those of its `Config`.
"""

import dataclasses
import time
from collections.abc import Mapping
from types import ModuleType

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from unifluid_jax.errors import UserError, nearest
from unifluid_jax.evals import caption, edit, generate, grid, reconstruction, vqa
from unifluid_jax.evals.base import EvalConfig, Outcome
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.inference import Model
from unifluid_jax.input.records import open_builder

# A type is a module with a `Config`, `read(config, c)` for its examples, and
# `score(subject, examples, c)`.
TYPES: Mapping[str, ModuleType] = {
    "caption": caption,
    "edit": edit,
    "generate": generate,
    "reconstruction": reconstruction,
    "vqa": vqa,
}


def check(config: ConfigDict) -> dict[str, EvalConfig]:
    """The evaluations of `config.evals`, by name; to be called before a run begins.

    Raises:
        UserError: an unknown type or field, a missing field, a value that makes no sense, or a data
            set or package that is not there.
    """
    checked = {name: _make(name, fields) for name, fields in config.evals.items()}
    for c in checked.values():
        open_builder(c.dataset, config.data_dir)
    return checked


def check_best(score: str, evals: Mapping[str, EvalConfig]) -> None:
    """Makes sure that `config.train.keep_best` can be one of the scores of a run.

    Raises:
        UserError: no evaluation during training has such a name.
    """
    known = [name for name, c in evals.items() if c.every]
    name, slash, _ = score.removeprefix("-").partition("/")
    if score and not (slash and name in known):
        raise UserError(
            f'config.train.keep_best is "{score}": give EVALUATION/SCORE, of an evaluation with '
            f'"every" above 0{nearest(name, known)}'
        )


def _make(name: str, fields: ConfigDict) -> EvalConfig:
    fields = fields.to_dict()
    kind = fields.get("type", "")
    if kind not in TYPES:
        raise UserError(f'config.evals.{name} is of unknown type "{kind}"{nearest(kind, TYPES)}')
    known = {field.name: field for field in dataclasses.fields(TYPES[kind].Config)}
    for field in fields:
        if field not in known:
            raise UserError(f'config.evals.{name} has no field "{field}"{nearest(field, known)}')
    for field in known.values():
        if field.name not in fields and field.default is dataclasses.MISSING:
            raise UserError(f'config.evals.{name} lacks the field "{field.name}"')
    for field in ("limit", "every", "pictures"):
        if fields[field] < 0:
            raise UserError(f"config.evals.{name}.{field} is {fields[field]}: set it to 0 or more")
    return TYPES[kind].Config(**fields)


def due(evals: Mapping[str, EvalConfig], step: int, steps: int) -> dict[str, EvalConfig]:
    """Those that training does after this step of `steps`."""
    return {
        name: c for name, c in evals.items() if c.every and (step % c.every == 0 or step == steps)
    }


def run_one(config: ConfigDict, subject: Model | ImageTokenizer, c: EvalConfig) -> Outcome:
    """One evaluation.

    Args:
        config: says where the data lie.
        subject: what is scored; an image tokenizer only by the type "reconstruction".

    Raises:
        UserError: the data are not there or do not fit, or the subject cannot do it.
    """
    if isinstance(subject, ImageTokenizer) and c.type != "reconstruction":
        raise UserError(
            f"an image tokenizer cannot be scored by the type {c.type}: use reconstruction"
        )
    module = TYPES[c.type]
    begun = time.perf_counter()
    examples = module.read(config, c)
    if not examples:
        raise UserError(f"nothing to evaluate in {c.dataset}/{c.split} for the type {c.type}")
    outcome = module.score(subject, examples, c)
    return dataclasses.replace(outcome, seconds=time.perf_counter() - begun)


def run(
    config: ConfigDict, subject: Model | ImageTokenizer, evals: Mapping[str, EvalConfig]
) -> tuple[dict[str, float], dict[str, UInt8[np.ndarray, "_h _w 3"]]]:
    """Some evaluations: their scores as "name/score", and a sheet of pictures of each."""
    scores, sheets = {}, {}
    for name, c in evals.items():
        outcome = run_one(config, subject, c)
        scores |= {f"{name}/{score}": value for score, value in outcome.scores.items()}
        if outcome.tiles:
            sheets[name] = grid.sheet({"": outcome.tiles})
    return scores, sheets
