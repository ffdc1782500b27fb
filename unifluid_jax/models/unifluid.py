"""UniFluid: one Gemma decoder over text, vision features and continuous image tokens.

It has a softmax head and a diffusion head.

Letters: as in `sequence.py`, and I pictures of a row, W width of the vision tower, D width of the
backbone, z the backbone's output.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from unifluid_jax import sharding
from unifluid_jax.models.functional import param, unstack
from unifluid_jax.models.gemma import Gemma, GemmaConfig
from unifluid_jax.models.head import DiffusionHead, HeadConfig
from unifluid_jax.models.kernels import Packed
from unifluid_jax.models.siglip import Siglip, SiglipConfig
from unifluid_jax.sequence import Modality

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class UniFluidConfig:
    """The parts, and what joins them.

    Attributes:
        image_tokens: N, grid cells of an image.
        position_init: scale of fresh content and target position embeddings. They are learned, and
            begin as sines and cosines of the cell's row and column (our choice): neighbours are
            alike from the start, and matching a cell with itself is a linear map away.
        target_in_head: add the target position once more to z before the head, as MAR does.
    """

    backbone: GemmaConfig
    vision: SiglipConfig
    head: HeadConfig
    image_tokens: int
    position_init: float = 1.0
    target_in_head: bool = True


class Linear(nnx.Module):
    """Affine map into the backbone's width."""

    def __init__(self, inputs: int, outputs: int, input_axis: str | None, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.lecun_normal()
        self.kernel = param(init, rngs.params(), (inputs, outputs), (input_axis, "embed"))
        self.bias = param(jax.nn.initializers.zeros, rngs.params(), (outputs,), ("embed",))

    def __call__(self, x: Float[Array, "B T inputs"], dtype: str) -> Float[Array, "B T D"]:
        parts = sharding.gathered(self, dtype)
        bias = parts.bias[...].astype(dtype)
        return x.astype(dtype) @ parts.kernel[...].astype(dtype) + bias[None, None]


class UniFluid(nnx.Module):
    """The whole model; `losses.py` trains it, `decode.py` samples from it."""

    def __init__(self, config: UniFluidConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.backbone.width
        shape, axes = (config.image_tokens, width), (None, "embed")

        def positions(*, half: int):
            return lambda key, shape, dtype: (
                config.position_init * _grid_waves(*shape, half).astype(dtype)
            )

        self.backbone = Gemma(config.backbone, rngs=rngs)
        self.vision = Siglip(config.vision, rngs=rngs)
        self.vision_proj = Linear(config.vision.width, width, None, rngs=rngs)
        self.latent_in = Linear(config.head.token_dim, width, None, rngs=rngs)
        # In a half of the dims each: they are added to one input and must not be mistaken.
        self.content_embed = param(positions(half=0), rngs.params(), shape, axes)
        self.target_embed = param(positions(half=1), rngs.params(), shape, axes)
        self.head = DiffusionHead(config.head, rngs=rngs)

    def unstacked(self) -> "UniFluid":
        """This module, changed: its layers are cut apart once, where they are not scanned.

        For what runs it in a loop, which would cut them anew at every turn.
        """
        if not self.config.backbone.scan_layers:
            layers = unstack(self.backbone.layers, self.config.backbone.depth)
            self.backbone.layers = nnx.List(layers)
        self.head.blocks = nnx.List(unstack(self.head.blocks, self.config.head.depth))
        return self

    def embed(self, batch: Batch, latents_BLC: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        """Embeddings of packed rows, in the compute type.

        Text is scaled by sqrt(D) (Gemma), vision features and latents are not (PaliGemma's
        convention).

        Args:
            batch: `tokens`, `modality`, `behind`, `content_position`, `target_position` [B, L]
                and `images` uint8 [B, I, H, W, 3]; or of fewer rows, of which the rows of the
                others are repetitions (branches of guidance).
            latents_BLC: samples of the latents kept at each position (see `sequence.py`).
        """
        modality_BL = batch["modality"]
        x_BLD = self.backbone.embed(batch["tokens"])
        if batch["images"].shape[1]:
            seen_BLD = self._vision_at(batch["images"], modality_BL == Modality.VISION)
            x_BLD = jnp.where((modality_BL == Modality.VISION)[:, :, None], seen_BLD, x_BLD)
        kept_BL = jnp.arange(modality_BL.shape[1])[None] - batch["behind"]
        fed_BLC = jnp.take_along_axis(latents_BLC, kept_BL[:, :, None], axis=1)
        latent_BLD = self.embed_content(fed_BLC, batch["content_position"])
        x_BLD = jnp.where((modality_BL == Modality.LATENT)[:, :, None], latent_BLD, x_BLD)
        return x_BLD + self.embed_target(batch["target_position"])

    def embed_content(
        self, latents_BTC: Float[Array, "B T C"], content_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """`W_in x + P_content`: a latent and the grid cell it stands on (-1: none)."""
        dtype = self.config.backbone.dtype
        return self.latent_in(latents_BTC, dtype) + _rows(self.content_embed, content_BT, dtype)

    def embed_target(self, target_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """`P_target`: the grid cell to be predicted (-1: none)."""
        return _rows(self.target_embed, target_BT, self.config.backbone.dtype)

    def hidden(self, batch: Batch, latents_BLC: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        """Final hidden states of packed rows.

        The full pass that training uses and cached decoding must equal.
        """
        x_BLD = sharding.over_replicas(self.embed(batch, latents_BLC))
        with jax.named_scope("backbone"):
            packed = Packed(batch["step"], batch["segment"])
            return self.backbone(x_BLD, batch["position"], packed)[0]

    def condition(
        self, hidden_BTD: Float[Array, "B T D"], target_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """z, what the diffusion head is conditioned on.

        Hidden states of positions that predict an image token.
        """
        if not self.config.target_in_head:
            return hidden_BTD
        return hidden_BTD + self.embed_target(target_BT)

    def _vision_at(self, images_BIHW3: jax.Array, here_BL: jax.Array) -> jax.Array:
        """Projected vision features.

        The k-th of a row stands at its k-th VISION position (anything elsewhere).
        """
        b, i, *pixels = images_BIHW3.shape
        images = images_BIHW3.reshape(b * i, *pixels).astype(jnp.float32) / 127.5 - 1.0
        with jax.named_scope("siglip"):
            features = self.vision(images)
        features = features.reshape(b, i * features.shape[1], features.shape[2])
        projected = self.vision_proj(features, self.config.backbone.dtype)
        projected = jnp.tile(projected, (len(here_BL) // b, 1, 1))
        rank_BL = jnp.maximum(jnp.cumsum(here_BL, axis=1) - 1, 0)
        return jnp.take_along_axis(projected, rank_BL[:, :, None], axis=1)


def _rows(table: nnx.Param, index_BT: jax.Array, dtype: str) -> jax.Array:
    """Rows of an embedding table; zeros where the index is negative."""
    rows = table[...].astype(dtype)[jnp.maximum(index_BT, 0)]
    return jnp.where((index_BT >= 0)[:, :, None], rows, jnp.zeros((), dtype))


def _grid_waves(cells: int, width: int, half: int) -> Float[Array, "N D"]:
    """Sines and cosines of the row and column of every cell of a square grid.

    They fill the first (0) or second (1) half of the dims. Frequencies are evenly spaced up to half
    a turn a cell: different rows, and different columns, are nearly orthogonal.
    """
    side, count = math.isqrt(cells), width // 8
    place = jnp.stack(jnp.divmod(jnp.arange(cells), side), axis=1).astype(jnp.float32)
    frequency = jnp.pi * jnp.arange(1, count + 1, dtype=jnp.float32) / count
    phase = (place[:, :, None] * frequency[None, None]).reshape(cells, 2 * count)
    waves = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=1)
    start = half * (width // 2)
    return jnp.pad(waves, ((0, 0), (start, width - start - waves.shape[1])))
