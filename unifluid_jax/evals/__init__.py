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

from unifluid_jax import sequence
from unifluid_jax.contrastive import Contrastive
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.evals import caption, edit, generate, grid, match, reconstruction, vqa
from unifluid_jax.evals.base import EvalConfig, Outcome
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.inference import Model
from unifluid_jax.input.records import Records

# A type is a module with a `Config`, `read(config, c)` for its examples, and
# `score(subject, examples, c)`.
TYPES: Mapping[str, ModuleType] = {
    "caption": caption,
    "edit": edit,
    "generate": generate,
    "match": match,
    "reconstruction": reconstruction,
    "vqa": vqa,
}

Subject = Model | ImageTokenizer | Contrastive
# What can be scored, in words, and by which types.
_SUBJECTS: Mapping[type, tuple[str, tuple[str, ...]]] = {
    Model: ("a UniFluid", ("caption", "edit", "generate", "reconstruction", "vqa")),
    ImageTokenizer: ("an image tokenizer", ("reconstruction",)),
    Contrastive: ("a SigLIP", ("match",)),
}


def check(config: ConfigDict) -> dict[str, EvalConfig]:
    """The evaluations of `config.evals`, by name; to be called before a run begins.

    Raises:
        UserError: an unknown type or field, a missing field, a value that makes no sense, a data
            set, split or package that is not there, or edits by a model that sees no source.
    """
    checked = {name: _make(name, fields) for name, fields in config.evals.items()}
    for c in checked.values():
        Records(c.dataset, c.split, config.data_dir, c.fields)  # refuses, and reads no record
        if c.type == "edit":
            sequence.check_views(config.input.edit_vision, config.input.edit_latents)
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


def run_one(config: ConfigDict, subject: Subject, c: EvalConfig) -> Outcome:
    """One evaluation.

    Args:
        config: says where the data lie.
        subject: what is scored; an image tokenizer only by "reconstruction", a SigLIP by "match".

    Raises:
        UserError: the data are not there or do not fit, or the subject cannot do it.
    """
    kind, types = next(can for known, can in _SUBJECTS.items() if isinstance(subject, known))
    if c.type not in types:
        raise UserError(f"{kind} cannot be scored by the type {c.type}: use {' or '.join(types)}")
    module = TYPES[c.type]
    begun = time.perf_counter()
    examples = module.read(config, c)
    if not examples:
        raise UserError(f"nothing to evaluate in {c.dataset}/{c.split} for the type {c.type}")
    outcome = module.score(subject, examples, c)
    return dataclasses.replace(outcome, seconds=time.perf_counter() - begun)


def run(
    config: ConfigDict, subject: Subject, evals: Mapping[str, EvalConfig]
) -> tuple[dict[str, float], dict[str, UInt8[np.ndarray, "_h _w 3"]]]:
    """Some evaluations: their scores as "name/score", and a sheet of pictures of each."""
    scores, sheets = {}, {}
    for name, c in evals.items():
        outcome = run_one(config, subject, c)
        scores |= {f"{name}/{score}": value for score, value in outcome.scores.items()}
        if outcome.tiles:
            sheets[name] = grid.sheet({"": outcome.tiles})
    return scores, sheets
