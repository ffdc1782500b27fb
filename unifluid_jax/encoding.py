"""The image tokenizer inside the training step, where latents do not come from a cache.

With `config.input.max_encoded_images` above 0 a batch brings pictures instead of latents, and the
step begins with their encoding: data that is seen once need not be encoded beforehand. The
encoder's weights are constants of the step: sharded like parameters, but neither trained, averaged
nor saved; they come from the files of `config.image_tokenizer` at every start.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from unifluid_jax import image_tokenizer
from unifluid_jax.image_tokenizer import ImageTokenizer
from unifluid_jax.models.functional import Functional, Params
from unifluid_jax.models.vae import VaeConfig, VaeEncoder
from unifluid_jax.sequence import latent_index


def axes(vae: VaeConfig) -> Params:
    """The tree of `constants` with logical axis names at every leaf."""
    return {"encoder": _encoder(vae).axes, "channel_mean": (None,), "channel_std": (None,)}


def abstract(vae: VaeConfig) -> Params:
    """The tree of `constants` as `jax.ShapeDtypeStruct`s."""
    statistics = jax.ShapeDtypeStruct((vae.token_dim,), jnp.float32)
    encoder = jax.eval_shape(_encoder(vae).init, jax.random.key(0))
    return {"encoder": encoder, "channel_mean": statistics, "channel_std": statistics}


def constants(tokenizer: ImageTokenizer) -> Params:
    """What the step needs of an image tokenizer: weights and statistics of its latents."""
    return {
        "encoder": {name: tokenizer.params[name] for name in _encoder(tokenizer.config).axes},
        "channel_mean": tokenizer.channel_mean,
        "channel_std": tokenizer.channel_std,
    }


def with_latents(
    vae: VaeConfig, constants: Params, batch: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """A batch with its `pictures` encoded; to be traced.

    Args:
        constants: the tree of `constants`.
        batch: packed rows, without `latent_mean` and `latent_std`; `pictures` uint8
            [B, P, H, W, 3].

    Returns:
        The batch with the two of them, float32 [B, L, C], and without `pictures`.
    """
    batch = dict(batch)
    pictures = batch.pop("pictures")
    rows, count = pictures.shape[:2]
    with jax.named_scope("vae"):
        pixels = image_tokenizer.to_pixels(pictures.reshape(rows * count, *pictures.shape[2:]))
        mean, std = _encoder(vae).bind(constants["encoder"]).encode(pixels)
    scale_C = constants["channel_std"][None, None]
    index_BL = latent_index(batch, vae.image_tokens)

    def placed(moments: jax.Array) -> jax.Array:
        moments = moments.reshape(rows, count * vae.image_tokens, vae.token_dim)
        moments = jnp.take_along_axis(moments, jnp.maximum(index_BL, 0)[:, :, None], axis=1)
        return jnp.where((index_BL >= 0)[:, :, None], moments, 0.0)

    batch["latent_mean"] = placed((mean - constants["channel_mean"][None, None]) / scale_C)
    batch["latent_std"] = placed(std / scale_C)
    return batch


@functools.lru_cache(maxsize=4)
def _encoder(vae: VaeConfig) -> Functional:
    return Functional(lambda rngs: VaeEncoder(vae, rngs=rngs))
