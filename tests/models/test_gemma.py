"""The decoder: fast paths against slow ones, and what may influence what."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import trees
from unifluid_jax.errors import UserError
from unifluid_jax.models import gemma
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import Gemma, GemmaConfig

# Every feature alive: grouped queries, a window shorter than the sequence, a depth that is no
# multiple of the pattern.
CONFIG = GemmaConfig(
    vocab_size=50,
    width=32,
    depth=5,
    mlp_dim=48,
    heads=4,
    kv_heads=2,
    head_dim=8,
    window=3,
    scan_layers=False,
)
B, T = 2, 9


def functional(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return Functional(lambda rngs: Gemma(config, rngs=rngs))


@pytest.fixture(scope="module")
def params():
    params = jax.jit(functional().init)(jax.random.key(0))
    # Norm scales off zero, so that their place in the block matters.
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )


@pytest.fixture(scope="module")
def inputs():
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, 50)
    position = jnp.broadcast_to(jnp.arange(T), (B, T))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    return tokens, position, mask


def full(functional, params, inputs):
    tokens, position, mask = inputs

    @jax.jit
    def run(params):
        model = functional.bind(params)
        return model.logits(model(model.embed(tokens), position, mask)[0])

    return run(params)


def test_scanned_equals_unrolled(params, inputs):
    unrolled = full(functional(), params, inputs)
    scanned = full(functional(scan_layers=True), params, inputs)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)


def test_scanned_equals_unrolled_in_gemma3(inputs):
    """Two bases of RoPE, norms of queries and keys; a depth below the pattern's length too."""
    gemma3 = {
        "attention": ("local",) * 5 + ("global",),
        "qk_norm": True,
        "rope_base": 1_000_000.0,
        "local_rope_base": 10_000.0,
        "rope_stretch": 8.0,
    }
    for depth in (4, 7):
        unrolled = functional(**gemma3, depth=depth)
        params = jax.jit(unrolled.init)(jax.random.key(0))
        scanned = functional(**gemma3, depth=depth, scan_layers=True)
        np.testing.assert_allclose(
            full(scanned, params, inputs), full(unrolled, params, inputs), atol=1e-5
        )


def gradient(f, params, inputs):
    return jax.grad(lambda p: jnp.square(full(f, p, inputs)).sum())(params)


@pytest.fixture(scope="module")
def unrolled_gradient(params, inputs):
    return gradient(functional(), params, inputs)


@pytest.mark.parametrize("remat", ["full", "mlp", "dots", "offload_qkv"])
def test_scanned_gradient_equals_unrolled_whatever_is_kept(
    params, inputs, unrolled_gradient, remat
):
    found = gradient(functional(scan_layers=True, remat=remat), params, inputs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(unrolled_gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def kept(remat):
    """Shapes that the layers keep for the backward pass, with the period and batch in front."""
    f = functional(depth=4, scan_layers=True, remat=remat)
    params = jax.eval_shape(f.init, jax.random.key(0))

    def total(params, x):
        position = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask = jnp.ones((B, T, T), bool)
        return f.bind(params)(x, position, mask)[0].sum()

    x = jax.ShapeDtypeStruct((B, T, 32), jnp.float32)
    _, backward = jax.eval_shape(lambda p, x: jax.vjp(total, p, x), params, x)
    return {leaf.shape for leaf in jax.tree.leaves(backward)}


def test_a_policy_keeps_what_it_names():
    gate, query = (2, B, T, 48), (2, B, T, 4, 8)  # two periods of two layers
    assert gate not in kept("full") and query not in kept("full")
    assert query in kept("qkv") and gate not in kept("qkv")
    assert gate in kept("mlp")


def test_an_unknown_policy_is_named():
    f = functional(remat="fulll")
    with pytest.raises(UserError, match='remat is "fulll".*did you mean "full"'):
        f.bind(f.init(jax.random.key(0)))(
            jnp.zeros((1, 2, 32)), jnp.zeros((1, 2), int), jnp.ones((1, 2, 2), bool)
        )


@pytest.mark.parametrize("scan", [False, True])
def test_cached_equals_full(params, inputs, scan):
    f = functional(scan_layers=scan)
    tokens, position, mask = inputs
    slots = T + 2
    model = f.bind(params)
    cache = model.init_cache(B, slots)
    x = model.embed(tokens)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, slots - T)))
    pieces, start = [], 0
    for length in (4, 1, 1, 3):
        piece = slice(start, start + length)
        hidden, cache = model(x[:, piece], position[:, piece], mask[:, piece], cache, start)
        pieces.append(hidden)
        start += length
    cached = model.logits(jnp.concatenate(pieces, axis=1))
    np.testing.assert_allclose(cached, full(f, params, inputs), atol=2e-5)


def test_a_later_token_has_exactly_no_gradient_into_an_earlier_output(params, inputs):
    tokens, position, mask = inputs
    model = functional().bind(params)

    def early(x):
        return jnp.square(model(x, position, mask)[0][:, :4]).sum()

    gradient = jax.grad(early)(model.embed(tokens))
    assert (gradient[:, 4:] == 0).all() and (gradient[:, 3] != 0).any()


def test_local_layers_see_their_window_and_global_ones_all(inputs):
    tokens, position, mask = inputs
    for kind, seen in (("local", [6, 7, 8]), ("global", list(range(9)))):
        f = functional(depth=1, attention=(kind,))
        model = f.bind(f.init(jax.random.key(0)))

        def last(x, model=model):
            return model(x, position, mask)[0][:, -1].sum()

        influence = jnp.abs(jax.grad(last)(model.embed(tokens))).sum((0, 2))
        np.testing.assert_array_equal(np.flatnonzero(influence), seen)


def slow_attention(q, k, v, mask, cap):
    b, t, h, d = q.shape
    group = h // k.shape[2]
    out = np.zeros((b, t, h, d))
    for i in np.ndindex(b, t, h):
        row, place, head = i
        logits = k[row, :, head // group] @ q[row, place, head]
        logits = np.where(mask[row, place], cap * np.tanh(logits / cap), -np.inf)
        weights = np.exp(logits - logits.max())
        out[i] = (weights / weights.sum()) @ v[row, :, head // group]
    return out


def test_attention_equals_loops():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 4, 8)).astype(np.float32) * 3
    k, v = rng.normal(size=(2, 2, 5, 2, 8)).astype(np.float32)
    mask = np.tril(np.ones((5, 5), bool))[None].repeat(2, 0)
    fast = gemma.attend(*map(jnp.asarray, (q, k, v, mask)), cap=5.0)
    np.testing.assert_allclose(fast, slow_attention(q, k, v, mask, 5.0), atol=1e-5)


def test_rope_depends_on_distance_alone():
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))
    dots = []
    for shift in (0, 7):
        turned = gemma.rope(x, jnp.array([[2 + shift, 5 + shift]]), 10_000.0)
        dots.append(jnp.vdot(turned[0, 0], turned[0, 1]))
    np.testing.assert_allclose(dots[0], dots[1], rtol=1e-5)


def test_stretched_rope_is_that_of_nearer_positions():
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))
    far = gemma.rope(x, jnp.array([[16, 40]]), 1e6, stretch=8.0)
    np.testing.assert_allclose(far, gemma.rope(x, jnp.array([[2, 5]]), 1e6), atol=1e-6)


def test_bfloat16_compute_keeps_float32_parameters(params, inputs):
    f = functional(dtype="bfloat16")
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(f.init(jax.random.key(0))))
    half, single = full(f, params, inputs), full(functional(), params, inputs)
    assert half.dtype == jnp.float32
    assert jnp.abs(half - single).mean() < 0.05 * single.std()


def test_logits_never_pass_the_cap(params, inputs):
    assert jnp.abs(full(functional(final_cap=0.5), params, inputs)).max() <= 0.5


def test_bind_refuses_another_tree(params):
    with pytest.raises(ValueError, match="do not fit"):
        functional().bind({"embedding": params["embedding"]})


def test_axes_name_every_dimension(params):
    jax.tree.map(
        lambda x, axes: np.testing.assert_equal(x.ndim, len(axes)),
        params,
        functional().axes,
    )


def test_fresh_layers_may_begin_quiet():
    fresh = jax.jit(functional(post_norm_init=0.25).init)(jax.random.key(0))
    scales = {name: x for name, x in trees.flatten(fresh).items() if name.endswith("norm/scale")}
    for name, scale in scales.items():
        np.testing.assert_array_equal(scale, -0.75 if "/post_" in name else 0, err_msg=name)
    assert sum("/post_" in name for name in scales) == 2
