"""A SigLIP: the vision tower and a text tower, trained on pictures and their captions.

UniFluid starts from a pretrained SigLIP. This is what pretrains a small one; of its parts, only the
vision tower goes into a UniFluid. (Zhai et al. 2023. Our choice: the picture's embedding is the
mean of its patch features, big_vision's `pool_type="gap"`, where the released towers have an
attention head that UniFluid would throw away.)

Letters: B pictures; K captions; T tokens of a caption, padding included; D dims of an embedding,
which are the width W of the towers.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from unifluid_jax.models import siglip
from unifluid_jax.models.functional import param, stack, unstack
from unifluid_jax.models.siglip import Siglip, SiglipConfig


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """Sizes of the text tower; its width is the vision tower's.

    Attributes:
        tokens: T, to which every caption is padded; padding is attended to, as in SigLIP.
    """

    vocab_size: int
    tokens: int
    depth: int
    heads: int
    mlp_dim: int


class Pair(nnx.Module):
    """Two towers into one space, and the scale and bias of their logits."""

    def __init__(self, vision: SiglipConfig, text: TextTowerConfig, *, rngs: nnx.Rngs):
        self.vision = Siglip(vision, rngs=rngs)
        self.text = TextTower(text, vision.width, vision.dtype, rngs=rngs)
        # SigLIP's: the many negatives of the first batch must not drive the first steps.
        self.log_scale = param(jax.nn.initializers.constant(2.302585), rngs.params(), (), ())
        self.bias = param(jax.nn.initializers.constant(-10.0), rngs.params(), (), ())

    def embed_images(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        """Unit vectors of pictures with values in [-1, 1]."""
        return _unit(self.vision(images_BHWC).mean(axis=1))

    def embed_texts(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B D"]:
        """Unit vectors of captions."""
        return _unit(self.text(tokens_BT))

    def logits(
        self, images_BD: Float[Array, "B D"], texts_KD: Float[Array, "K D"]
    ) -> Float[Array, "B K"]:
        """How well each picture goes with each text: log odds."""
        return jnp.exp(self.log_scale[...]) * (images_BD @ texts_KD.T) + self.bias[...]


class TextTower(nnx.Module):
    """SigLIP's text encoder: a transformer without a mask, its last position is the text."""

    def __init__(self, config: TextTowerConfig, width: int, dtype: str, *, rngs: nnx.Rngs):
        axes = (None, "vision_embed")
        block = SiglipConfig(0, 1, width, config.depth, config.heads, config.mlp_dim, dtype=dtype)
        self.config, self.dtype = config, jnp.dtype(dtype)
        normal = jax.nn.initializers.normal
        shape = (config.vocab_size, width)
        self.embedding = param(normal(width**-0.5), rngs.params(), shape, ("vocab", None))
        self.positions = param(normal(0.01), rngs.params(), (config.tokens, width), axes)
        self.blocks = stack(lambda r: siglip.Block(block, rngs=r), config.depth, rngs)
        self.final_norm = siglip.norm(width, self.dtype, rngs)
        lecun = jax.nn.initializers.lecun_normal()
        self.out = param(lecun, rngs.params(), (width, width), ("vision_embed", None))

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B D"]:
        x_BTW = self.embedding[...].astype(self.dtype)[tokens_BT]
        x_BTW += self.positions[...].astype(self.dtype)[None]
        for block in unstack(self.blocks, self.config.depth):
            x_BTW = block(x_BTW)
        return self.final_norm(x_BTW[:, -1]) @ self.out[...].astype(self.dtype)


def _unit(x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
    x_BD = x_BD.astype(jnp.float32)
    return x_BD * jax.lax.rsqrt(jnp.square(x_BD).sum(axis=1, keepdims=True) + 1e-12)
