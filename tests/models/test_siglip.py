"""The vision tower: a slow twin, patch order, scan against unrolled."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax.models import siglip
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.siglip import Siglip, SiglipConfig

# 14 pixels in patches of 4: two pixels are left over on each side.
CONFIG = SiglipConfig(image_size=14, patch_size=4, width=12, depth=2, heads=3, mlp_dim=20)


@functools.cache
def functional(config=CONFIG):
    return Functional(lambda rngs: Siglip(config, rngs=rngs))


@pytest.fixture(scope="module")
def params():
    """Random everywhere: no bias is zero and no scale one."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functional().init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0.1, 0.4, x.shape)), shapes)


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(2), (2, 14, 14, 3), minval=-1.0)


def features(params, images, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return jax.jit(lambda p, x: functional(config).bind(p)(x))(params, images)


def reference(params, image):
    """One picture in float64: a PyTorch-style convolution kernel, attention head by head."""
    p = jax.tree.map(np.float64, params)
    image = np.float64(image)

    def norm(q, v):
        v = v - v.mean(-1, keepdims=True)
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * q["scale"] + q["bias"]

    def gelu(v):
        return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    # The convolution whose kernel [out, in, ph, pw] the documented recipe turns into ours.
    kernel = p["patch_in"]["kernel"].reshape(4, 4, 3, 12).transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(
        kernel.transpose(2, 3, 1, 0).reshape(-1, 12), p["patch_in"]["kernel"]
    )
    x = np.zeros((3, 3, 12))
    for row in range(3):
        for column in range(3):
            patch = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            x[row, column] = np.einsum("oihw,hwi->o", kernel, patch) + p["patch_in"]["bias"]
    x = x.reshape(9, 12) + p["positions"]
    for i in range(2):
        q = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        h, out = norm(q["attention_norm"], x), q["attention_out"]["bias"]
        for head in range(3):
            query, key, value = (
                h @ q[name]["kernel"][:, head] + q[name]["bias"][head]
                for name in ("query", "key", "value")
            )
            weights = np.exp(query @ key.T / math.sqrt(4))
            weights /= weights.sum(-1, keepdims=True)
            out = out + weights @ value @ q["attention_out"]["kernel"][head]
        x = x + out
        h = gelu(norm(q["mlp_norm"], x) @ q["mlp_in"]["kernel"] + q["mlp_in"]["bias"])
        x = x + h @ q["mlp_out"]["kernel"] + q["mlp_out"]["bias"]
    return norm(p["final_norm"], x)


def test_against_slow_twin(params, images):
    slow = np.stack([reference(params, image) for image in images])
    np.testing.assert_allclose(features(params, images), slow, rtol=1e-4, atol=1e-4)


def test_scan_is_unrolled(params, images):
    """One set of parameters, two ways to run it: the same features and gradients."""

    def run(scan_layers):
        config = dataclasses.replace(CONFIG, scan_layers=scan_layers)

        def loss(p):
            x_BMW = functional(config).bind(p)(images)
            return jnp.square(x_BMW[:, :, 0]).sum(), x_BMW

        gradient, x_BMW = jax.jit(jax.grad(loss, has_aux=True))(params)
        return x_BMW, gradient

    (unrolled, gradient), (scanned, scanned_gradient) = run(False), run(True)
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5)
    for (path, g), other in zip(
        jax.tree_util.tree_leaves_with_path(gradient),
        jax.tree.leaves(scanned_gradient),
        strict=True,
    ):
        np.testing.assert_allclose(g, other, rtol=1e-3, atol=1e-4)
        assert np.all(np.isfinite(g)), path
        # A bias of the keys adds the same to all logits of a query: no gradient but rounding.
        assert [k.key for k in path[1:]] == ["key", "bias"] or np.any(np.abs(g) > 1e-3), path


def test_pictures_of_a_batch_do_not_meet(params, images):
    changed = images.at[1].set(0.0)
    before, after = features(params, images), features(params, changed)
    np.testing.assert_allclose(before[0], after[0], atol=1e-6)
    assert np.max(np.abs(before[1] - after[1])) > 1e-2


def test_left_over_pixels_are_cut_off(params, images):
    np.testing.assert_array_equal(
        features(params, images),
        features(params, images.at[:, 12:].set(0.5).at[:, :, 12:].set(0.5)),
    )


def test_sizes():
    so400m = SiglipConfig(224, 14, width=1152, depth=27, heads=16, mlp_dim=4304)
    assert so400m.tokens == 256
    assert dataclasses.replace(so400m, image_size=384).tokens == 27 * 27
    shapes = jax.eval_shape(functional(so400m).init, jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    w, mlp = 1152, 4304
    block = 4 * (w * w + w) + (w * mlp + mlp) + (mlp * w + w) + 4 * w
    assert count == 27 * block + (588 * w + w) + 256 * w + 2 * w
    assert shapes["blocks"]["query"]["kernel"].shape == (27, 1152, 16, 72)


def test_axes(params):
    axes = functional().axes
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    for names, x in zip(
        jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(params), strict=True
    ):
        assert len(names) == x.ndim
    assert axes["blocks"]["query"]["kernel"] == (
        "layers",
        "vision_embed",
        "vision_heads",
        "head_dim",
    )
    assert axes["blocks"]["query"]["bias"] == ("layers", "vision_heads", "head_dim")
    assert axes["blocks"]["attention_out"]["bias"] == ("layers", "vision_embed")
    assert axes["blocks"]["mlp_out"]["kernel"] == ("layers", "vision_mlp", "vision_embed")


def test_bfloat16(params, images):
    rounded = features(params, images, dtype="bfloat16")
    assert rounded.dtype == jnp.bfloat16
    exact = features(params, images)
    assert np.abs(rounded.astype(jnp.float32) - exact).mean() < 0.05 * np.abs(exact).mean()


def test_wrong_sizes():
    with pytest.raises(ValueError, match="12 is not divisible by heads 5"):
        functional(dataclasses.replace(CONFIG, heads=5)).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"\(16, 16\) pixels for a tower of \(14, 14\)"):
        tower = functional()
        jax.eval_shape(
            lambda key, x: tower.bind(tower.init(key))(x),
            jax.random.key(0),
            jnp.zeros((1, 16, 16, 3)),
        )


def test_pooling_averages_squares_of_patches(images):
    config = dataclasses.replace(CONFIG, image_size=16, patch_size=4)
    shapes = jax.eval_shape(functional(config).init, jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.float32(rng.normal(0.1, 0.4, x.shape)), shapes)
    images = jax.random.uniform(jax.random.key(3), (2, 16, 16, 3), minval=-1.0)
    pooled = dataclasses.replace(config, pool=2)
    assert (config.tokens, pooled.tokens) == (16, 4)
    found = functional(pooled).bind(params)(images)
    every = np.asarray(functional(config).bind(params)(images)).reshape(2, 4, 4, -1)
    for row in range(2):
        for column in range(2):
            square = every[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_allclose(
                found[:, 2 * row + column], square.mean((1, 2)), rtol=1e-4, atol=1e-5
            )


def test_a_pool_that_does_not_divide_the_patches_is_refused():
    with pytest.raises(ValueError, match="pool 2 does not divide 3 patches"):
        functional(dataclasses.replace(CONFIG, pool=2)).init(jax.random.key(0))


def test_resized_positions():
    """The same grid is left alone, constants stay, rows and columns are not mixed up."""
    row, column = np.divmod(np.arange(64), 8)
    table = np.stack([np.ones(64), row, column], axis=1).astype(np.float32)
    np.testing.assert_array_equal(siglip.resize_positions(table, 8), table)
    resized = siglip.resize_positions(table, 12).reshape(12, 12, 3)
    np.testing.assert_allclose(resized[:, :, 0], 1.0, rtol=1e-6)
    np.testing.assert_array_equal(resized[:, :, 1], resized[:, :, 2].T)
    assert (np.diff(resized[:, 0, 1]) > 0).all() and np.ptp(resized[0, :, 1]) < 1e-6
    with pytest.raises(ValueError, match="63 positions are no square grid"):
        siglip.resize_positions(table[1:], 4)
