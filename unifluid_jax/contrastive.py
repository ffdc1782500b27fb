"""A trained SigLIP: pictures against captions.

What is left of it in a UniFluid is its vision tower: `unifluid convert --to=siglip` takes it out of
a run, `unifluid convert --siglip=...` brings it in.
"""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Float, UInt8

from unifluid_jax import sharding
from unifluid_jax.image_tokenizer import in_chunks, to_pixels
from unifluid_jax.input.tokenizer import TextTokenizer
from unifluid_jax.models.functional import Functional, Params


@dataclasses.dataclass(frozen=True, eq=False)
class Contrastive:
    """A pair of towers with its parameters.

    Attributes:
        image_size: side of the pictures it reads, pixels.
        tokens: to which captions are padded.
        batch: pictures or captions embedded at a time.
    """

    model: Functional
    params: Params
    text: TextTokenizer
    image_size: int
    tokens: int
    batch: int = 64

    def logits(
        self, images: UInt8[np.ndarray, "B H W 3"], captions: list[str]
    ) -> Float[np.ndarray, "B K"]:
        """How well each picture goes with each caption: log odds."""
        tokens_KT = np.stack([self.text.padded(caption, self.tokens) for caption in captions])
        embed_images = functools.partial(_images, self.model)
        embed_texts = functools.partial(_texts, self.model)
        images_BD = in_chunks(embed_images, self.params, images, self.batch)
        texts_KD = in_chunks(embed_texts, self.params, tokens_KT, self.batch)
        embedded = sharding.spread((images_BD, texts_KD), sharding.mesh_of(self.params))
        return sharding.fetch(_logits(self.model, self.params, *embedded))


@functools.partial(jax.jit, static_argnums=0)
def _images(model: Functional, params: Params, images: jax.Array) -> jax.Array:
    return model.bind(params).embed_images(to_pixels(images))


@functools.partial(jax.jit, static_argnums=0)
def _texts(model: Functional, params: Params, tokens_KT: jax.Array) -> jax.Array:
    return model.bind(params).embed_texts(tokens_KT)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    model: Functional, params: Params, images_BD: jax.Array, texts_KD: jax.Array
) -> jax.Array:
    return model.bind(params).logits(images_BD, texts_KD)
