"""The diffusion head: MAR's network, its first outputs, its broadcasting."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax.diffusion import DDPM
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.head import DiffusionHead, HeadConfig
from unifluid_jax.samplers import Ancestral, guided

CONFIG = HeadConfig(token_dim=4, cond_dim=40, width=64, depth=2, out_dim=8, time_dim=32)


@functools.cache
def functional(config=CONFIG):
    return Functional(lambda rngs: DiffusionHead(config, rngs=rngs))


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(functional().init)(jax.random.key(0))


@pytest.fixture(scope="module")
def params(fresh):
    """A head away from its initialisation, where nothing is zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.float32(rng.normal(0, 0.2, x.shape)), fresh)


def inputs(*shape, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (*shape, CONFIG.token_dim))
    z = jax.random.normal(keys[1], (*shape, CONFIG.cond_dim))
    return x, jax.random.randint(keys[2], shape, 0, 1000), z


@functools.partial(jax.jit, static_argnames="config")
def apply(params, x, t, z, config=CONFIG):
    return functional(config).bind(params)(x, t, z)


def reference(params, x, t, z):
    """MAR's network in float64 numpy, one token at a time."""
    p = jax.tree.map(np.float64, params)
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    dense = lambda q, v: v @ q["kernel"] + q["bias"]  # noqa: E731
    norm = lambda v: (v - v.mean()) / np.sqrt(v.var() + 1e-6)  # noqa: E731
    half = CONFIG.time_dim // 2
    angles = [t * 10_000 ** (-i / half) for i in range(half)]
    time = np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
    y = dense(p["time_out"], silu(dense(p["time_in"], time))) + dense(p["cond_in"], z)
    h = dense(p["token_in"], x)
    for i in range(CONFIG.depth):
        q = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
        shift, scale, gate = np.split(dense(q["modulation"], silu(y)), 3)
        inner = norm(h) * q["norm"]["scale"] + q["norm"]["bias"]
        inner = inner * (1 + scale) + shift
        h = h + gate * dense(q["mlp_out"], silu(dense(q["mlp_in"], inner)))
    shift, scale = np.split(dense(p["final_modulation"], silu(y)), 2)
    return dense(p["final_out"], norm(h) * (1 + scale) + shift)


def test_against_slow_twin(params):
    x, t, z = inputs(5)
    out = apply(params, x, t, z)
    slow = [reference(params, *np.array([x[i]]), int(t[i]), np.array(z[i])) for i in range(5)]
    np.testing.assert_allclose(out, slow, rtol=1e-3, atol=1e-3 * np.abs(slow).max())


def test_initialisation(fresh):
    """Zero output, identity blocks; Xavier linears of the right scale, small time MLP."""
    np.testing.assert_array_equal(apply(fresh, *inputs(7)), 0)
    for name in ("final_modulation", "final_out"):
        assert not np.any(fresh[name]["kernel"])
    assert not np.any(fresh["blocks"]["modulation"]["kernel"])
    p = jax.tree.map(np.asarray, fresh)
    for kernel in (p["cond_in"]["kernel"], p["blocks"]["mlp_in"]["kernel"][1]):
        bound = math.sqrt(6 / sum(kernel.shape))
        assert np.abs(kernel).max() == pytest.approx(bound, rel=0.01)
        assert np.std(kernel) == pytest.approx(bound / math.sqrt(3), rel=0.04)
    for name in ("time_in", "time_out"):
        assert np.std(p[name]["kernel"]) == pytest.approx(0.02, rel=0.08)
    assert np.any(p["blocks"]["mlp_in"]["kernel"][0] != p["blocks"]["mlp_in"]["kernel"][1])
    zero = [p["cond_in"]["bias"], p["time_in"]["bias"], p["blocks"]["mlp_in"]["bias"]]
    assert not any(np.any(bias) for bias in zero)


def test_size_of_mars_default():
    config = HeadConfig(token_dim=16, cond_dim=1024, width=1024, depth=3, out_dim=32)
    shapes = jax.eval_shape(functional(config).init, jax.random.key(0))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    w = 1024
    block = 2 * w + 2 * (w * w + w) + 3 * (w * w + w)
    ends = (16 * w + w) + (w * w + w) + (256 * w + w + w * w + w) + 2 * (w * w + w) + (w * 32 + 32)
    assert count == 3 * block + ends
    assert count == pytest.approx(21e6, rel=0.05)


def test_axes(fresh):
    axes = functional().axes
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    for names, x in zip(
        jax.tree.leaves(axes, is_leaf=is_axes), jax.tree.leaves(fresh), strict=True
    ):
        assert len(names) == x.ndim
        named = [name for name in names if name]
        assert len(set(named)) == len(named)
    assert axes["blocks"]["mlp_in"]["kernel"] == ("layers", "head_width", "head_mlp")
    assert axes["cond_in"]["kernel"] == ("embed", "head_mlp")


def test_draws_broadcast(params):
    """z_ND is shared by the draws; the result is that of a loop over draws and tokens."""
    x, t, _ = inputs(3, 5)
    _, _, z = inputs(5, seed=1)
    together = apply(params, x, t, z)
    assert together.shape == (3, 5, 8)
    loop = [[apply(params, x[r, n], t[r, n], z[n]) for n in range(5)] for r in range(3)]
    np.testing.assert_allclose(together, np.array(loop), rtol=1e-4, atol=1e-4)


def test_branches_and_one_time_broadcast(params):
    x, _, _ = inputs(5)
    _, _, z = inputs(2, 5, seed=1)
    together = apply(params, x[None], jnp.float32(250), z)
    assert together.shape == (2, 5, 8)
    time = jnp.full(5, 250)
    one_by_one = jnp.stack([apply(params, x, time, z[0]), apply(params, x, time, z[1])])
    np.testing.assert_allclose(together, one_by_one, rtol=1e-4, atol=1e-4)


def test_fractional_times(params):
    """Flow matching tells the head 1000 t: times between the integers are times of their own."""
    x, _, z = inputs(1)
    out = [apply(params, x, jnp.float32(t), z) for t in (500, 500.5, 501)]
    assert np.max(np.abs(out[0] - out[1])) > 1e-4
    assert np.max(np.abs(out[1] - out[2])) > 1e-4


def test_bfloat16(params):
    """Compute in bfloat16, parameters and output in float32."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    x, t, z = inputs(50)
    exact = apply(params, x, t, z)
    rounded = apply(params, x, t, z.astype(jnp.bfloat16), config)
    assert rounded.dtype == jnp.float32
    assert np.any(rounded != rounded.astype(jnp.bfloat16))
    assert 0 < np.abs(rounded - exact).mean() < 0.05 * np.abs(exact).mean()
    for leaf in jax.tree.leaves(jax.eval_shape(functional(config).init, jax.random.key(0))):
        assert leaf.dtype == jnp.float32


def test_every_parameter_learns(fresh, params):
    """From zero the output layer alone learns; one perturbation later everything does."""
    x, _, z = inputs(20)

    @jax.jit
    @jax.grad
    def gradient(params):
        head = functional().bind(params)
        return DDPM().loss(jax.random.key(2), lambda x, t: head(x, t, z), x, 4).mean()

    at_first = gradient(fresh)
    assert np.any(at_first["final_out"]["kernel"])
    assert not np.any(at_first["token_in"]["kernel"])
    for path, g in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.all(np.isfinite(g)), path
        assert np.any(g), path
        if path[0].key == "blocks":
            assert all(np.any(layer) for layer in g), path


def test_guided_sampling_with_the_head(fresh):
    """The whole chain in one program; a row's token does not depend on the rows around it."""
    keys = jax.random.split(jax.random.key(0), 4)
    _, _, z = inputs(2, 4)

    @jax.jit
    def sample(params, keys, z, guidance):
        head = functional().bind(params)
        predict = guided(lambda x, t: head(x, t, z), [guidance], 4)
        return Ancestral(DDPM(), 8, clip=3.0)(keys, predict, 4, 0.9)

    params = jax.tree.map(lambda x: x + 0.01, fresh)
    weights = jnp.array([1.0, 2.0, 3.0, 4.0])
    together = sample(params, keys, z, weights)
    assert together.shape == (4, 4) and np.all(np.isfinite(together))
    alone = sample(params, keys[2:3], z[:, 2:3], weights[2:3])
    np.testing.assert_allclose(alone[0], together[2], atol=1e-4)
    assert np.max(np.abs(sample(params, keys, z, jnp.full(4, 9.0)) - together)) > 1e-3
