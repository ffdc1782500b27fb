"""The image tokenizer's network and its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import image_tokenizer
from unifluid_jax.errors import UserError
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


@pytest.fixture
def saved(tmp_path, params):
    stats = np.linspace(0.5, 1.2, CONFIG.token_dim).astype(np.float32)
    image_tokenizer.save(tmp_path / "t", CONFIG, params, stats, stats + 1, {"note": "test"})
    return tmp_path / "t"


def test_files_round_trip(saved, params):
    tokenizer = image_tokenizer.load(saved)
    assert tokenizer.config == CONFIG and tokenizer.info["note"] == "test"
    for a, b in zip(jax.tree.leaves(tokenizer.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_chunks_do_not_show(saved):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3)).astype(np.uint8)
    whole = image_tokenizer.load(saved)
    mean, std = whole.encode(images)
    assert mean.shape == (5, 16, 8)
    for i in range(5):
        np.testing.assert_allclose(whole.encode(images[i : i + 1])[0][0], mean[i], atol=1e-5)
    assert whole.decode(mean).dtype == np.uint8


def test_another_size_is_refused(saved):
    with pytest.raises(UserError, match="16 x 16 pictures, got 8 x 8"):
        image_tokenizer.load(saved).encode(np.zeros((1, 8, 8, 3), np.uint8))


def test_broken_files_are_named(saved, tmp_path):
    with pytest.raises(UserError, match="no image tokenizer at"):
        image_tokenizer.load(tmp_path / "nothing")
    config = json.loads((saved / "config.json").read_text())
    wider = {**config, "vae": {**config["vae"], "latent_channels": 3}}
    (saved / "config.json").write_text(json.dumps(wider))
    with pytest.raises(UserError, match=r"has shape .* the config says"):
        image_tokenizer.load(saved)
    (saved / "config.json").write_text(json.dumps(config))
    weights = (saved / "weights.safetensors").read_bytes()
    (saved / "weights.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="is damaged"):
        image_tokenizer.load(saved)


def test_psnr_of_a_known_error():
    a = np.full((1, 4, 4, 3), 100, np.uint8)
    np.testing.assert_allclose(image_tokenizer.psnr(a, a + 16), 20 * np.log10(255 / 16))
    assert image_tokenizer.psnr(a, a) == 100
