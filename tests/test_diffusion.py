"""Diffusion: exact constants, losses against slow float64 twins."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.gaussian import FIXED, alpha_bars
from unifluid_jax import diffusion
from unifluid_jax.diffusion import DDPM, Flow
from unifluid_jax.errors import UserError


def posterior(indices, s, x, noisy):
    """Mean and variance of q(x_before | x_t, x) by the product of two Gaussian densities."""
    bars = alpha_bars()[indices]
    before, now = (bars[s - 1] if s else 1.0), bars[s]
    alpha = now / before
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    mean = (
        math.sqrt(before) * x / (1 - before) + math.sqrt(alpha) * noisy / (1 - alpha)
    ) / precision
    return mean, 1 / precision


def test_alpha_bar_numbers():
    bars = np.cumprod(1 - diffusion.cosine_betas(1000))
    np.testing.assert_allclose(bars, alpha_bars(), rtol=1e-12)
    # The closed form holds as long as no beta was clipped; only the last is.
    closed = (
        math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2
        / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    assert bars[499] == pytest.approx(closed, rel=1e-9)
    assert diffusion.cosine_betas(1000).argmax() == 999
    assert bars[999] == pytest.approx(bars[998] * 0.001, rel=1e-12)
    assert bars[[0, 999]] == pytest.approx([0.99995872, 2.4287e-09], rel=1e-4)


def test_respacing():
    # guided-diffusion's space_timesteps(1000, "8") and so on.
    assert diffusion.respaced(1000, 8) == [0, 143, 285, 428, 571, 714, 856, 999]
    assert diffusion.respaced(1000, 3) == [0, 500, 999]  # 499.5 rounds to even
    assert diffusion.respaced(1000, 1000) == list(range(1000))
    hundred = diffusion.respaced(1000, 100)
    assert hundred[:4] == [0, 10, 20, 30] and hundred[-2:] == [989, 999]
    assert len(set(hundred)) == 100
    for count in (0, 1, 1001):
        with pytest.raises(UserError, match="set 2 to 1000"):
            diffusion.respaced(1000, count)


def test_respaced_chain_keeps_alpha_bar():
    indices = diffusion.respaced(1000, 10)
    chain = DDPM().chain(10)
    np.testing.assert_array_equal(chain.time, indices)
    np.testing.assert_allclose(chain.signal**2, alpha_bars()[indices], rtol=1e-5)
    np.testing.assert_allclose(chain.signal_before[1:], chain.signal[:-1], rtol=1e-6)
    assert chain.signal_before[0] == 1


@pytest.mark.parametrize("count", [1000, 100, 10])
def test_posterior(count):
    indices = diffusion.respaced(1000, count)
    chain = DDPM().chain(count)
    x, noisy = 0.8, -1.3
    for s in range(1, count, max(1, count // 10)):
        mean, variance = posterior(indices, s, x, noisy)
        ours = chain.mean_from_clean[s] * x + chain.mean_from_noisy[s] * noisy
        assert ours == pytest.approx(mean, rel=1e-4, abs=1e-6)
        assert math.exp(chain.log_min[s]) == pytest.approx(variance, rel=1e-4)
    assert chain.log_min[0] == chain.log_min[1]
    assert np.all(chain.log_min[1:] <= chain.log_max[1:])


def shown(loss, dim):
    """What a loss shows to its network: noisy tokens and times."""

    def run():
        seen = []
        loss(lambda *args: seen.extend(args) or jnp.zeros((*args[0].shape[:-1], 2 * dim)))
        return seen

    return [np.asarray(value) for value in jax.jit(run)()]


def test_noised_tokens_have_the_marginals():
    """The network is shown sqrt(a) x + sqrt(1 - a) noise, with noise of unit variance."""
    x = jnp.full((3, 5), 0.5)
    noise = jax.random.normal(jax.random.key(0), (3, 5))
    at = jnp.array([0, 500, 999])
    noisy, t = shown(lambda predict: DDPM().loss_at(predict, x, at, noise), 5)
    bar = alpha_bars()[[0, 500, 999], None]
    np.testing.assert_allclose(noisy, np.sqrt(bar) * x + np.sqrt(1 - bar) * noise, atol=1e-6)
    np.testing.assert_array_equal(t, at)

    x = jnp.full((1000, 4), 0.5)
    noisy, t = shown(lambda predict: DDPM().loss(jax.random.key(1), predict, x, draws=8), 4)
    assert noisy.shape == (8, 1000, 4) and t.shape == (8, 1000)
    assert t.min() >= 0 and t.max() <= 999
    np.testing.assert_allclose(np.histogram(t, 10, (0, 1000))[0] / 8000, 0.1, atol=0.02)
    bar = alpha_bars()[t.astype(int)][..., None]
    residual = (noisy - 0.5 * np.sqrt(bar)) / np.sqrt(1 - bar)
    assert residual.mean() == pytest.approx(0, abs=0.02)
    assert residual.std() == pytest.approx(1, abs=0.02)


def test_first_loss():
    x = jax.random.normal(jax.random.key(0), (500, 8))

    def loss(process):
        zero = lambda x, t: jnp.zeros((*x.shape[:-1], process.outputs(8)))  # noqa: E731
        return np.asarray(jax.jit(lambda key: process.loss(key, zero, x, 4))(jax.random.key(1)))

    noise_only = loss(DDPM(vlb_weight=0.0))
    assert noise_only.shape == (500,)
    assert noise_only.mean() == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(loss(FIXED), noise_only, rtol=1e-6)
    assert loss(Flow()).mean() == pytest.approx(2, abs=0.06)


def reference_vlb(x, noise, t, out):
    """The VLB term of one dim in bits: float64, one number at a time, textbook formulas."""
    bars = alpha_bars()
    before, bar = (bars[t - 1] if t else 1.0), bars[t]
    beta = 1 - bar / before
    noisy = math.sqrt(bar) * x + math.sqrt(1 - bar) * noise
    clean = (noisy - math.sqrt(1 - bar) * out[0]) / math.sqrt(bar)
    first = (1 - bars[1] / bars[0]) * (1 - bars[0]) / (1 - bars[1])
    least = beta * (1 - before) / (1 - bar) if t else first
    fraction = (out[1] + 1) / 2
    log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(least)
    of_clean, of_noisy = (
        beta * math.sqrt(before) / (1 - bar),
        (1 - before) * math.sqrt(1 - beta) / (1 - bar),
    )
    true, mean = of_clean * x + of_noisy * noisy, of_clean * clean + of_noisy * noisy
    if t == 0:
        cdf = lambda v: 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))  # noqa: E731
        scale = math.exp(-0.5 * log_variance)
        low, high = cdf(scale * (x - mean - 1 / 255)), cdf(scale * (x - mean + 1 / 255))
        mass = high if x < -0.999 else 1 - low if x > 0.999 else high - low
        return -math.log(max(mass, 1e-12)) / math.log(2)
    kl = math.log(math.exp(log_variance) / least) - 1
    kl += (least + (true - mean) ** 2) / math.exp(log_variance)
    return 0.5 * kl / math.log(2)


@pytest.mark.parametrize("t", [0, 1, 37, 500, 998, 999])
def test_loss_against_slow_twin(t):
    rng = np.random.default_rng(t)
    x = np.array([0.3, -1.7, 2.0, -0.05])  # inside the pixel range and on both sides of it
    noise, out = rng.normal(size=4), rng.normal(size=8)
    # A network on its way: the noise nearly right.
    out[:4] = noise + 0.01 * out[:4]
    predict = lambda *_: jnp.asarray(out, jnp.float32)  # noqa: E731
    given = (predict, jnp.float32(x), jnp.array(t), jnp.float32(noise))
    mse = np.mean((noise - out[:4]) ** 2)
    vlb = np.mean([reference_vlb(x[i], noise[i], t, (out[i], out[4 + i])) for i in range(4)])
    assert DDPM(vlb_weight=0.0).loss_at(*given) == pytest.approx(mse, rel=1e-4)
    assert DDPM().loss_at(*given) == pytest.approx(mse + vlb, rel=1e-3)
    assert DDPM(vlb_weight=0.1).loss_at(*given) == pytest.approx(mse + 0.1 * vlb, rel=1e-3)


def test_vlb_trains_the_variance_alone():
    x, noise = jax.random.normal(jax.random.key(0), (2, 6, 3))
    t = jnp.array([0, 1, 10, 300, 900, 999])
    out = jax.random.normal(jax.random.key(1), (6, 6))

    def gradient(process):
        loss = lambda out: process.loss_at(lambda *_: out, x, t, noise).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(out)

    with_term, without = gradient(DDPM()), gradient(DDPM(vlb_weight=0.0))
    np.testing.assert_array_equal(with_term[:, :3], without[:, :3])
    assert np.all(without[:, 3:] == 0) and np.all(np.any(with_term[1:, 3:] != 0, axis=-1))
    assert np.all(np.isfinite(with_term))


def test_a_jump_of_the_loss_at_the_last_step_is_none_of_the_gradient():
    """The documented trap of the variational term, as in MAR: large, and nothing to learn from."""
    process, shape = DDPM(), (256, 4)
    x, noise = (jax.random.normal(jax.random.key(seed), shape) for seed in range(2))

    def loss(logits, t):
        out = jnp.concatenate([jnp.zeros(shape), logits], axis=-1)
        return process.loss_at(lambda x, t: out, x, jnp.full(shape[:1], t), noise).mean()

    values, gradients = zip(
        *(jax.value_and_grad(loss)(jnp.zeros(shape), t) for t in (0, 500, 999)), strict=True
    )
    assert values[0] < 5 and values[1] < 2 and values[2] > 300
    first, _, last = (jnp.abs(g).mean() for g in gradients)
    assert last < 0.02 * first


def test_flow_loss():
    x, noise = jax.random.normal(jax.random.key(0), (2, 5, 3))
    t = jnp.linspace(0.1, 0.9, 5)
    seen = {}

    def perfect(noisy, time):
        seen.update(time=time)
        return (noisy - x) / t[:, None]

    np.testing.assert_allclose(Flow().loss_at(perfect, x, t, noise), 0, atol=1e-9)
    np.testing.assert_allclose(seen["time"], 1000 * t)
    t = Flow(logit_mean=1.0, logit_std=0.5).times(jax.random.key(0), (20_000,))
    logit = np.log(t / (1 - t))
    assert logit.mean() == pytest.approx(1, abs=0.02) and logit.std() == pytest.approx(
        0.5, abs=0.02
    )


def test_the_draws_of_a_token_are_spread_over_the_times():
    """One in each of R equal parts, uniform in it and independent from token to token."""
    u_RN = np.asarray(diffusion.spread(jax.random.key(1), (4, 5_000)))
    np.testing.assert_array_equal(np.floor(4 * u_RN), np.arange(4)[:, None] * np.ones((4, 5_000)))
    within = 4 * u_RN - np.arange(4)[:, None]
    assert np.abs(within.mean(1) - 0.5).max() < 0.02
    assert np.abs(within.var(1) - 1 / 12).max() < 0.005
    assert np.abs(np.corrcoef(within) - np.eye(4)).max() < 0.05
    steps_RN = np.asarray(DDPM().times(jax.random.key(2), (4, 5_000)))
    np.testing.assert_array_equal(steps_RN // 250, np.arange(4)[:, None] * np.ones((4, 5_000)))
    assert steps_RN.min() == 0 and steps_RN.max() == 999
    single = np.asarray(diffusion.spread(jax.random.key(3), (1, 20_000)))
    assert single.mean() == pytest.approx(0.5, abs=0.01) and 0 < single.min() < single.max() < 1


def test_construction_from_configs():
    process = diffusion.process_from(process="ddpm", vlb_weight=0.5)
    assert process == DDPM(vlb_weight=0.5)
    assert DDPM().outputs(16) == 32 and DDPM(learned_variance=False).outputs(16) == 16
    assert Flow().outputs(16) == 16
    assert DDPM(steps=50).duration == 50 and Flow().duration == 1000
    with pytest.raises(UserError, match="'edm' here: choose one of ddpm, flow"):
        diffusion.process_from("edm")
    with pytest.raises(UserError, match="'flow' has no option vlb_weight: it has logit_mean"):
        diffusion.process_from("flow", vlb_weight=1.0)
