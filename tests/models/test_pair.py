"""The two towers of a SigLIP: unit vectors, log odds, padding, what goes into a UniFluid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax.models.functional import Functional
from unifluid_jax.models.pair import Pair, TextTowerConfig
from unifluid_jax.models.siglip import Siglip, SiglipConfig

VISION = SiglipConfig(image_size=16, patch_size=8, width=12, depth=1, heads=3, mlp_dim=20)
TEXT = TextTowerConfig(vocab_size=11, tokens=5, depth=2, heads=3, mlp_dim=20)


@pytest.fixture(scope="module")
def model():
    return Functional(lambda rngs: Pair(VISION, TEXT, rngs=rngs))


@pytest.fixture(scope="module")
def params(model):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0.1, 0.4, x.shape)), shapes)


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (3, 16, 16, 3), minval=-1.0)


TOKENS = jnp.array([[3, 4, 1, 0, 0], [3, 5, 6, 1, 0]])


def test_fresh_logits_start_from_siglips_scale_and_bias(model):
    params = model.init(jax.random.key(0))
    assert params["log_scale"] == pytest.approx(np.log(10)) and params["bias"] == -10


def test_logits_are_scaled_cosines(model, params, images):
    pair = model.bind(params)
    x, y = pair.embed_images(images), pair.embed_texts(TOKENS)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=1), 1, rtol=1e-5)
    wanted = np.exp(params["log_scale"]) * (np.asarray(x) @ np.asarray(y).T) + params["bias"]
    np.testing.assert_allclose(pair.logits(x, y), wanted, rtol=1e-5)


def test_a_picture_is_the_mean_of_the_features_that_a_unifluid_reads(model, params, images):
    tower = Functional(lambda rngs: Siglip(VISION, rngs=rngs)).bind(params["vision"])
    mean = np.asarray(tower(images)).mean(axis=1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(model.bind(params).embed_images(images), mean, rtol=1e-5, atol=1e-6)


def test_every_token_and_its_place_matter(model, params):
    embed = jax.jit(lambda tokens: model.bind(params).embed_texts(tokens))
    first = embed(TOKENS)[0]
    for place in range(TEXT.tokens):
        changed = TOKENS.at[0, place].set(9)
        assert np.abs(embed(changed)[0] - first).max() > 1e-3, place
    swapped = TOKENS[:, jnp.array([1, 0, 2, 3, 4])]
    assert np.abs(embed(swapped)[0] - first).max() > 1e-3
