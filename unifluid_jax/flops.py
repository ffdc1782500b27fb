"""Floating-point operations of the model by part, from its sizes alone.

Counted are the multiply-adds of matrix products and convolutions, two operations each; what is
elementwise is not. Attention counts the pairs that its mask lets through. "Model FLOPs" of a
training step are one forward pass for what is frozen and three for what is trained (forward, and
the gradients to inputs and to weights); recomputation does not count, so that no choice of memory
makes a step look better. MFU is model FLOPs over time and peak.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluidConfig
from unifluid_jax.models.vae import VaeConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """Forward operations of one part of the model, and whether it is trained."""

    forward: float
    trained: bool = True

    @property
    def step(self) -> float:
        """Model FLOPs of a training step."""
        return self.forward * (3 if self.trained else 1)


def attended(length: int, window: int | None = None) -> float:
    """Positions a position sees in a causal row of this length, on average.

    Args:
        window: positions that a local layer sees, itself included.
    """
    return float(np.minimum(np.arange(length) + 1, length if window is None else window).mean())


def backbone(config: GemmaConfig, length: int) -> float:
    """One row of this length through all layers, as one causal example."""
    c = config
    projections = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    matrices = c.depth * (projections + 3 * c.width * c.mlp_dim)
    kinds = [c.attention[i % len(c.attention)] for i in range(c.depth)]
    pairs = sum(attended(length, c.window if kind == "local" else None) for kind in kinds)
    return 2.0 * length * (matrices + 2 * pairs * c.heads * c.head_dim)


def logits(config: GemmaConfig, targets: int) -> float:
    """Vocabulary logits of so many targets."""
    return 2.0 * targets * config.width * config.vocab_size


def head(config: HeadConfig, tokens: int, draws: int) -> float:
    """The diffusion head: the condition once for each image token, the rest for each draw."""
    c, w = config, config.width
    per_draw = c.token_dim * w + c.time_dim * w + w * w + c.depth * 5 * w * w
    per_draw += 2 * w * w + w * c.out_dim
    return 2.0 * tokens * (c.cond_dim * w + draws * per_draw)


def siglip(config: SiglipConfig, pictures: int) -> float:
    """The vision tower, with attention of all patches to all."""
    c, w, patches = config, config.width, config.grid**2
    block = 4 * w * w + 2 * patches * w + 2 * w * c.mlp_dim
    return 2.0 * pictures * patches * (3 * c.patch_size**2 * w + c.depth * block)


def vae_encoder(config: VaeConfig, pictures: int) -> float:
    """The image tokenizer's encoder."""
    c = config
    widths = [c.channels * m for m in c.multipliers]
    z2 = 2 * c.latent_channels

    def residual(inputs: int, outputs: int) -> int:
        return 9 * (inputs + outputs) * outputs + (inputs * outputs if inputs != outputs else 0)

    def attention(width: int, places: int) -> int:
        return places * (4 * width * width + 2 * places * width)

    side = c.image_size
    total = 9.0 * 3 * widths[0] * side**2
    for level, width in enumerate(widths):
        inputs = widths[max(level - 1, 0)]
        blocks = residual(inputs, width) + (c.blocks - 1) * residual(width, width)
        total += blocks * side**2
        if level in c.encoder_attention:
            total += c.blocks * attention(width, side**2)
        if level < len(widths) - 1:
            side //= 2
            total += 9 * width * width * side**2
    total += 2 * residual(widths[-1], widths[-1]) * side**2 + attention(widths[-1], side**2)
    total += (9 * widths[-1] * z2 + z2 * z2) * side**2
    return 2.0 * pictures * total


def of_row(
    config: UniFluidConfig,
    *,
    length: int,
    text_targets: int,
    image_targets: int,
    draws: int,
    pictures: int,
    frozen: Mapping[str, bool],
    vae: VaeConfig | None = None,
    encoded: int = 0,
) -> dict[str, Part]:
    """The parts of the model on one packed row of a batch.

    Args:
        length: positions.
        text_targets, image_targets: slots for targets that the heads run on.
        draws: of noise for each image token.
        pictures: that the vision tower reads.
        frozen: of "backbone", "vision", "head": whether it is.
        vae: the image tokenizer, when it encodes so many pictures (`encoded`) inside the step.
    """
    trained = {name: not frozen.get(name, False) for name in ("backbone", "vision", "head")}
    width = config.backbone.width
    projection = (
        2.0
        * width
        * (config.vision.width * config.vision.tokens * pictures + config.head.token_dim * length)
    )
    parts = {
        "backbone": Part(backbone(config.backbone, length), trained["backbone"]),
        "logits": Part(logits(config.backbone, text_targets), trained["backbone"]),
        "head": Part(head(config.head, image_targets, draws), trained["head"]),
        "projections": Part(projection),
        "siglip": Part(siglip(config.vision, pictures), trained["vision"]),
    }
    if vae is not None:
        parts["vae"] = Part(vae_encoder(vae, encoded), trained=False)
    return parts
