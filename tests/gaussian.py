"""Tokens of a Gaussian, whose best networks are known in closed form; and what else is shared."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from unifluid_jax.diffusion import DDPM

FIXED = DDPM(learned_variance=False)
MEAN, STD = 0.7, 0.4


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def alpha_bars(steps=1000):
    """A slow twin: one step after another, plain Python floats."""
    product, result = 1.0, []
    for i in range(steps):
        start = math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        end = math.cos(((i + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        product *= 1 - min(1 - end / start, 0.999)
        result.append(product)
    return np.array(result)


def gaussian_noise_predictor(logit=None):
    """E[noise | x_t] for tokens of N(MEAN, STD^2); `logit` fills the variance logits."""
    bars = jnp.asarray(alpha_bars(), jnp.float32)

    def predict(x, t):
        bar = bars[t.astype(int)]
        bar = bar[..., None] if bar.ndim else bar
        gain = jnp.sqrt(1 - bar) / (bar * STD**2 + 1 - bar)
        noise = gain * (x - jnp.sqrt(bar) * MEAN)
        return noise if logit is None else jnp.concatenate([noise, jnp.full_like(x, logit)], -1)

    return predict


def gaussian_velocity(x, t):
    """E[noise - x | x_t] for tokens of N(MEAN, STD^2)."""
    t = t / 1000
    gain = (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)
    return -MEAN + gain * (x - (1 - t) * MEAN)
