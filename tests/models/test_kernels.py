"""The kernels of the chips against the einsum, on the CPU where they can be interpreted there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from unifluid_jax import sharding
from unifluid_jax.errors import UserError
from unifluid_jax.models import gemma, kernels
from unifluid_jax.models.kernels import Packed

B, T, H, G, K = 2, 256, 4, 2, 128


def packed(bidirectional):
    """Rows of several examples of unlike lengths, padded; with and without whole prefixes."""
    rng = np.random.default_rng(0)
    step, segment = np.ones((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        ends = np.sort(rng.choice(np.arange(40, T - 10), 2 + row % 2, replace=False))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            segment[row, start:end] = number
            if bidirectional:
                step[row, start + 1 : start + (end - start) // 2] = 0
    return Packed(jnp.asarray(step), jnp.asarray(segment))


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, T, H, K), (B, T, G, K), (B, T, G, K)]
    q, k, v = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    return q * K**-0.5, k, v


def einsum(q, k, v, rows, window, cap):
    place = jnp.arange(T)
    near = place[:, None] - place[None] < (window or T)
    return gemma.attend(q, k, v, rows.mask() & near[None], cap)


def real(rows):
    return (rows.segment > 0)[:, :, None, None]


@pytest.mark.parametrize(
    ("bidirectional", "window", "cap", "mesh"),
    [
        (False, None, 5.0, None),
        (True, 64, None, None),
        (True, None, 5.0, (2, 1, 2)),
        (False, 64, 5.0, (1, 1, 4)),  # two key heads for four devices
    ],
)
def test_splash_is_the_einsum_under_the_same_vectors(bidirectional, window, cap, mesh):
    rows, qkv = packed(bidirectional), inputs()
    weights = jax.random.normal(jax.random.key(1), qkv[0].shape) * real(rows)

    def run(attend):
        def total(q, k, v):
            y = attend(q, k, v)
            return (y * weights).sum(), y

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*qkv)

    (_, slow), slow_gradients = run(lambda *x: einsum(*x, rows, window, cap))
    if mesh is None:
        (_, fast), gradients = run(lambda *x: kernels.splash(*x, rows, window, cap))
    else:
        sizes = dict(zip(sharding.AXES, mesh, strict=True))
        with jax.set_mesh(sharding.make_mesh(ConfigDict(sizes), jax.devices()[:4])):
            (_, fast), gradients = run(lambda *x: kernels.splash(*x, rows, window, cap))
    np.testing.assert_allclose(fast * real(rows), slow * real(rows), atol=2e-5)
    for a, b in zip(gradients, slow_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize(("bidirectional", "window"), [(False, None), (True, 64)])
def test_cudnn_is_the_einsum(bidirectional, window):
    rows = packed(bidirectional)
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    place = jnp.arange(T)
    near = place[:, None] - place[None] < (window or T)
    mask = rows.mask() & near[None]
    slow = gemma.attend(q, k, v, mask, None)
    fast = jax.jit(kernels.cudnn)(q, k, v, mask)
    np.testing.assert_allclose(
        (fast * real(rows)).astype(np.float32), (slow * real(rows)).astype(np.float32), atol=0.02
    )


def test_auto_is_the_best_for_the_devices(monkeypatch):
    def auto(platform, length=512, head_dim=256, cap=None):
        monkeypatch.setattr(sharding, "platform", lambda: platform)
        return kernels.choose("auto", length, head_dim, cap)

    assert auto("cpu") == "einsum" and auto("tpu") == "splash" and auto("gpu") == "cudnn"
    assert auto("tpu", length=100) == auto("tpu", head_dim=64) == auto("gpu", cap=50.0) == "einsum"


@pytest.mark.parametrize(
    ("kernel", "length", "cap", "message"),
    [
        ("splahs", 128, None, 'kernel is "splahs": one of auto, einsum, splash, cudnn'),
        ("splash", 100, None, "multiple of 128 positions.*seq_len is 100"),
        ("cudnn", 128, 50.0, "no soft cap.*kernel to einsum"),
    ],
)
def test_a_kernel_that_cannot_is_refused(kernel, length, cap, message):
    with pytest.raises(UserError, match=message):
        kernels.choose(kernel, length, 128, cap)
