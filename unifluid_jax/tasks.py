"""What can be trained: a `Task` joins a model, its data and its loss; `train.py` knows nothing else of them.

A task sees configs and pytrees. `init`, `totals` and `loss` are pure and are traced inside the trainer's step.
"""

import functools
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from unifluid_jax import image_tokenizer, losses
from unifluid_jax.diffusion import process_from
from unifluid_jax.errors import UserError
from unifluid_jax.input import pipeline
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig
from unifluid_jax.models.vae import VaeConfig

Batch = dict[str, jax.Array]


class Task(Protocol):
    """A model to be trained.

    Attributes:
        model: its `init` and its logical axes.
    """

    model: Functional

    def batches(self) -> Any:
        """This process's batches: a Grain iterator of dicts of numpy arrays, rows first."""

    def totals(self, batch: Batch) -> Any:
        """What the losses of a whole batch are divided by, before it is cut for gradient accumulation."""

    def loss(
        self, params: Params, batch: Batch, key_B: jax.Array, total: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of some rows, and scalars that add up over the parts of a batch."""

    def subject(self, params: Params) -> Any:
        """What the evaluations of `config.evals` score."""


class UniFluidTask:
    """The unified model on packed rows of all four tasks."""

    def __init__(self, config: ConfigDict):
        self._config = config
        self._process = process_from(**config.diffusion)
        self.model = unifluid(config)

    def batches(self) -> Any:
        return pipeline.packed_batches(self._config)

    def totals(self, batch: Batch) -> dict[str, jax.Array]:
        return losses.totals(batch)

    def loss(self, params, batch, key_B, total):
        return losses.unified(
            self.model.bind(params),
            self._process,
            batch,
            key_B,
            total,
            text_slots=self._config.input.max_text_targets,
            image_slots=self._config.input.max_image_targets,
            **self._config.loss,
        )
