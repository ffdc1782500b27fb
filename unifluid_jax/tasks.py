"""What can be trained: a `Task` joins a model, its data and its loss; `train.py` knows no more.

A task sees configs and pytrees. `totals` and `loss` are pure and are traced inside the step.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from unifluid_jax import image_tokenizer, losses
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.inference import Model
from unifluid_jax.input import pipeline
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.vae import VaeConfig
from unifluid_jax.parts import Blueprint, Parts, assemble, make_part

Batch = dict[str, jax.Array]


@runtime_checkable
class Task(Protocol):
    """A model to be trained.

    Attributes:
        model: its `init` and its logical axes.
    """

    model: Functional

    def batches(self, process: int, processes: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of every batch, rows first; with Grain's get_state and set_state."""

    def count(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        """What some rows hold, by kind: for speeds."""

    def totals(self, batch: Batch) -> Any:
        """What a batch's losses are divided by, before it is cut for gradient accumulation."""

    def loss(
        self, params: Params, batch: Batch, key_B: jax.Array, total: Any
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """The loss of some rows, and scalars; all add up over the parts of a batch."""

    def subject(self, params: Params) -> Model | ImageTokenizer:
        """What the evaluations of `config.evals` score."""


def make(config: ConfigDict) -> Task:
    """The task that `config.task` names.

    Raises:
        UserError: there is no such task, or its config does not fit.
    """
    if config.task not in _TASKS:
        raise UserError(f'config.task is "{config.task}"{nearest(config.task, _TASKS)}')
    return _TASKS[config.task](config)


class UniFluidTask:
    """The unified model, on packed rows of all four tasks."""

    def __init__(self, config: ConfigDict, parts: Parts | Blueprint | None = None):
        """`parts`: a blueprint will do to trace the step; by default all of them are read."""
        self._config = config
        self._parts = assemble(config) if parts is None else parts
        self.model = self._parts.model

    def batches(self, process: int, processes: int) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.packed_batches(self._config, self._parts.sequencer, process, processes)

    def count(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        return {
            "examples": int(batch["segment"].max(axis=1).sum()),
            "tokens": np.count_nonzero(batch["segment"]),
            "text_targets": np.count_nonzero(batch["text_weight"]),
            "image_targets": np.count_nonzero(batch["image_weight"]),
        }

    def totals(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        return losses.totals(batch)

    def loss(
        self, params: Params, batch: Batch, key_B: jax.Array, total: dict[str, Float[Array, ""]]
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        return losses.unified(
            self.model.bind(params),
            self._parts.process,
            batch,
            key_B,
            total,
            text_slots=self._config.input.max_text_targets,
            image_slots=self._config.input.max_image_targets,
            **self._config.loss,
        )

    def subject(self, params: Params) -> Model:
        return Model(self._parts, params)


class TokenizerTask:
    """The image tokenizer, on plain pictures."""

    def __init__(self, config: ConfigDict):
        self._config = config
        self._vae = make_part(VaeConfig, "config.model", config.model)
        self.model = image_tokenizer.module(self._vae)

    def batches(self, process: int, processes: int) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.picture_batches(self._config, process, processes)

    def count(self, batch: dict[str, np.ndarray]) -> dict[str, int]:
        return {"examples": len(batch["images"])}

    def totals(self, batch: Batch) -> float:
        return float(batch["images"].size)

    def loss(
        self, params: Params, batch: Batch, key_B: jax.Array, total: float
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        pixels = image_tokenizer.to_pixels(batch["images"])
        return losses.autoencoder(
            self.model.bind(params), pixels, key_B, total, **self._config.loss
        )

    def subject(self, params: Params) -> ImageTokenizer:
        dim = self._vae.token_dim
        return ImageTokenizer(
            self._vae, params, np.zeros(dim, np.float32), np.ones(dim, np.float32), "", {}
        )


_TASKS = {"unifluid": UniFluidTask, "tokenizer": TokenizerTask}
