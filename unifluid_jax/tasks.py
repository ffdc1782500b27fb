"""What can be trained: a `Task` joins a model, its data and its loss; `train.py` knows no more.

A task sees configs and pytrees. `totals` and `loss` are pure and are traced inside the step.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from unifluid_jax import config as configs
from unifluid_jax import encoding, estimate, image_tokenizer, losses
from unifluid_jax.contrastive import Contrastive
from unifluid_jax.errors import UserError, nearest
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.inference import Model
from unifluid_jax.input import pipeline
from unifluid_jax.input.examples import encodes_in_step
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.lora import Adapted
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.pair import Pair, TextTowerConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.vae import VaeConfig
from unifluid_jax.parts import Blueprint, Parts, assemble
from unifluid_jax.sequence import Modality

Batch = dict[str, jax.Array]


@runtime_checkable
class Task(Protocol):
    """A model to be trained.

    Attributes:
        model: its `init` and its logical axes.
        constants: weights that its loss reads beside the model's, neither trained nor saved, often
            none; abstract where it was made of a blueprint.
        constant_axes: their logical axes.
    """

    model: Functional | Adapted
    constants: Params
    constant_axes: Params

    def batches(self, rows: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
        """Some rows of every global batch, by default all; with Grain's get_state and set_state."""

    def count(self, batch: Batch) -> dict[str, jax.Array | int]:
        """What a batch holds, by kind: for speeds."""

    def model_flops(self, params: Params) -> float | None:
        """Model FLOPs of a step (flops.py) that trains these parameters; None where unknown."""

    def totals(self, batch: Batch) -> Any:
        """What a batch's losses are divided by, before it is cut for gradient accumulation."""

    def loss(
        self, params: Params, constants: Params, batch: Batch, key_B: jax.Array, total: Any
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """The loss of some rows, and scalars; all add up over the parts of a batch."""

    def subject(self, params: Params) -> Model | ImageTokenizer | Contrastive:
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
        fixed = ("model", "process", "batch", "key_B", "total", "text_slots", "image_slots")
        configs.check_options(losses.unified, "config.loss", config.loss, fixed)
        self.model = self._parts.trained
        self.constants, self.constant_axes = {}, {}
        if encodes_in_step(config.input):
            vae = self._parts.vae
            self.constant_axes = encoding.axes(vae)
            self.constants = (
                encoding.abstract(vae)
                if isinstance(self._parts, Blueprint)
                else encoding.constants(self._parts.images)
            )

    def batches(self, rows: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.packed_batches(self._config, self._parts.sequencer, rows)

    def count(self, batch: Batch) -> dict[str, jax.Array | int]:
        layout = self._parts.sequencer.layout
        kinds = (Modality.TEXT, Modality.VISION, Modality.LATENT)
        text, vision, latent = (jnp.count_nonzero(batch["modality"] == kind) for kind in kinds)
        return {
            "examples": batch["segment"].max(axis=1).sum(),
            "tokens": text + vision + latent,
            "text_tokens": text,
            "image_tokens": latent,
            "images_read": vision // layout.vision_tokens,
            "images_drawn": jnp.count_nonzero(batch["image_weight"]) // layout.image_tokens,
        }

    def model_flops(self, params: Params) -> float | None:
        by_part = estimate.parts(self._parts, params)
        return self._config.input.batch_size * sum(part.step for part in by_part.values())

    def totals(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        return losses.totals(batch)

    def loss(
        self,
        params: Params,
        constants: Params,
        batch: Batch,
        key_B: jax.Array,
        total: dict[str, Float[Array, ""]],
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        if constants:
            batch = encoding.with_latents(self._parts.vae, constants, batch)
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
        return Model(self._parts, self._parts.merged(params))


class TokenizerTask:
    """The image tokenizer, on plain pictures."""

    constants: Params = {}
    constant_axes: Params = {}

    def __init__(self, config: ConfigDict):
        self._config = config
        if "lora" in config:
            raise UserError('config.lora is for the task "unifluid": leave it out')
        fixed = ("model", "images", "key_B", "total")
        configs.check_options(losses.autoencoder, "config.loss", config.loss, fixed)
        self._vae = configs.make_part(VaeConfig, "config.model", config.model)
        self.model = image_tokenizer.module(self._vae)

    def batches(self, rows: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.picture_batches(self._config, rows)

    def count(self, batch: Batch) -> dict[str, jax.Array | int]:
        return {"examples": len(batch["images"])}

    def model_flops(self, params: Params) -> float | None:
        return None

    def totals(self, batch: Batch) -> float:
        return float(batch["images"].size)

    def loss(
        self, params: Params, constants: Params, batch: Batch, key_B: jax.Array, total: float
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


class SiglipTask:
    """A SigLIP, on pictures with their captions."""

    constants: Params = {}
    constant_axes: Params = {}

    def __init__(self, config: ConfigDict):
        self._config = config
        if "lora" in config:
            raise UserError('config.lora is for the task "unifluid": leave it out')
        if config.train.accumulate != 1:
            raise UserError(
                f"config.train.accumulate is {config.train.accumulate}: a picture is compared with "
                "the captions of its batch, so the batch of the task siglip must stay whole; set 1"
            )
        self._text = configs.make_part(TextTokenizer, "config.tokenizer", config.tokenizer)
        c = config.model
        vision = configs.make_part(SiglipConfig, "config.model.vision", c.vision)
        text = configs.make_part(
            TextTowerConfig, "config.model.text", c.text, vocab_size=self._text.vocab_size
        )
        self.model = Functional(lambda rngs: Pair(vision, text, rngs=rngs))

    def batches(self, rows: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.captioned_batches(self._config, self._text, rows)

    def count(self, batch: Batch) -> dict[str, jax.Array | int]:
        return {"examples": len(batch["images"])}

    def model_flops(self, params: Params) -> float | None:
        return None

    def totals(self, batch: Batch) -> float:
        return float(len(batch["images"]))

    def loss(
        self, params: Params, constants: Params, batch: Batch, key_B: jax.Array, total: float
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        pixels = image_tokenizer.to_pixels(batch["images"])
        return losses.contrastive(self.model.bind(params), pixels, batch["tokens"], total)

    def subject(self, params: Params) -> Contrastive:
        c = self._config.model
        return Contrastive(self.model, params, self._text, c.vision.image_size, c.text.tokens)


_TASKS = {"unifluid": UniFluidTask, "tokenizer": TokenizerTask, "siglip": SiglipTask}
