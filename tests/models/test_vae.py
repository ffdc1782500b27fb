"""The image tokenizer's network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import image_tokenizer
from unifluid_jax.models import vae
from unifluid_jax.models.vae import VaeConfig

CONFIG = VaeConfig(
    image_size=16, channels=4, multipliers=(1, 2), blocks=1, latent_channels=2, groups=2, patch=2
)


@pytest.fixture(scope="module")
def params():
    return jax.jit(image_tokenizer.module(CONFIG).init)(jax.random.key(0))


def test_group_and_ungroup_are_inverse():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    tokens = vae.group(x, 2)
    assert tokens.shape == (2, 4, 12)
    np.testing.assert_array_equal(vae.ungroup(tokens, 2), x)


def test_group_is_mars_patchify():
    """MAR: einsum("nchpwq->nhwcpq") on NCHW latents."""
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    nchw = x.transpose(0, 3, 1, 2).reshape(2, 3, 2, 2, 2, 2)
    expected = np.einsum("nchpwq->nhwcpq", nchw).reshape(2, 4, 12)
    np.testing.assert_array_equal(vae.group(jnp.asarray(x), 2), expected)


def test_shapes_and_sizes(params):
    bound = image_tokenizer.module(CONFIG).bind(params)
    mean, std = bound.encode(jnp.zeros((3, 16, 16, 3)))
    assert mean.shape == std.shape == (3, CONFIG.image_tokens, CONFIG.token_dim) == (3, 16, 8)
    assert (std > 0).all()
    assert bound.decode(mean).shape == (3, 16, 16, 3)


def test_stable_diffusions_sizes():
    config = VaeConfig()
    assert (config.image_tokens, config.token_dim) == (256, 16)
    abstract = jax.eval_shape(image_tokenizer.module(config).init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(abstract))
    assert count == 83_653_863  # parameters of SD 1.x's AutoencoderKL


def test_group_norm_equals_its_definition():
    x = np.random.default_rng(0).normal(3, 2, size=(2, 5, 5, 6)).astype(np.float32)
    from flax import nnx

    norm = vae.GroupNorm(6, 3, rngs=nnx.Rngs(0))
    grouped = x.reshape(2, 25, 3, 2)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=1e-4)
