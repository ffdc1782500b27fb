"""Diffusion: exact constants, slow float64 twins, samplers against analytic targets."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unifluid_jax import diffusion
from unifluid_jax.diffusion import DDIM, DDPM, Ancestral, Euler, Flow
from unifluid_jax.errors import UserError

FIXED = DDPM(learned_variance=False)
MEAN, STD = 0.7, 0.4  # of the Gaussian target whose best denoiser is known in closed form


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


def best_reverse_predictor(steps):
    """The best noise and variance logits for N(MEAN, STD^2) on the chain respaced to `steps`."""
    indices = diffusion.respaced(1000, steps)
    bars = alpha_bars()[indices]
    before = np.append(1, bars[:-1])
    beta = 1 - bars / before
    least = beta * (1 - before) / (1 - bars)
    least[0] = least[1]
    # Var(x_before | x_t) = E Var(. | x, x_t) + Var E(. | x, x_t), the second by Var(x | x_t).
    unknown = STD**2 * (1 - bars) / (bars * STD**2 + 1 - bars)
    variance = least + (beta * np.sqrt(before) / (1 - bars)) ** 2 * unknown
    fraction = np.log(variance / least) / np.log(beta / least)
    logits = np.zeros(1000, np.float32)
    logits[indices] = 2 * fraction - 1
    noise = gaussian_noise_predictor()
    return lambda x, t: jnp.concatenate(
        [noise(x, t), jnp.full_like(x, jnp.asarray(logits)[t.astype(int)])], axis=-1
    )


@pytest.mark.parametrize(
    ("sampler", "predict", "tolerance"),
    [
        # With the right variance the reverse steps are exact, however few.
        (Ancestral(DDPM(), 15), best_reverse_predictor(15), 0.02),
        # The posterior's variance is the least there is: samples come out a little narrow.
        (Ancestral(FIXED, 250), gaussian_noise_predictor(), 0.06),
        (DDIM(FIXED, 100), gaussian_noise_predictor(), 0.03),
        (Euler(Flow(), 100), gaussian_velocity, 0.03),
    ],
    ids=["learned", "fixed", "ddim", "euler"],
)
def test_samples_of_the_best_network_have_the_target_distribution(sampler, predict, tolerance):
    x = np.asarray(jax.jit(lambda key: sampler(key, predict, 4))(keys(5000)))
    assert x.shape == (5000, 4) and x.dtype == np.float32
    np.testing.assert_allclose(x.mean(0), MEAN, atol=0.02)
    np.testing.assert_allclose(x.std(), STD, rtol=tolerance)
    np.testing.assert_allclose(np.corrcoef(x.T) - np.eye(4), 0, atol=0.06)


def test_learned_variance_spans_its_range():
    """v = -1 is the posterior's variance, v = 1 the forward step's."""

    @jax.jit
    def width(key, logit):
        return Ancestral(DDPM(), 20)(key, gaussian_noise_predictor(logit), 2).std()

    fixed = Ancestral(FIXED, 20)(keys(2000), gaussian_noise_predictor(), 2).std()
    widths = [width(keys(2000), logit) for logit in (-1.0, 0.0, 1.0)]
    np.testing.assert_allclose(widths[0], fixed, rtol=1e-5)
    assert widths[0] < widths[1] < widths[2]


def ancestral_by_hand(key, predict, dim, steps, temperature):
    """A slow twin of `Ancestral`: a Python loop over textbook formulas, float64."""
    indices = diffusion.respaced(1000, steps)
    bars = alpha_bars()[indices]
    draw = lambda k, i: np.float64(jax.random.normal(jax.random.fold_in(k, i), (dim,)))  # noqa: E731
    x = np.stack([draw(k, 0) for k in key])
    for s in reversed(range(steps)):
        out = np.float64(predict(jnp.float32(x), jnp.float32(indices[s])))
        noise, fraction = out[:, :dim], (out[:, dim:] + 1) / 2
        before = bars[s - 1] if s else 1.0
        beta = 1 - bars[s] / before
        x = (x - beta / np.sqrt(1 - bars[s]) * noise) / np.sqrt(1 - beta)
        if s:
            least = beta * (1 - before) / (1 - bars[s])
            std = np.exp(0.5 * (fraction * np.log(beta) + (1 - fraction) * np.log(least)))
            x += temperature * std * np.stack([draw(k, s + 1) for k in key])
    return x


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ancestral_against_slow_twin(temperature):
    predict = lambda x, t: gaussian_noise_predictor(0.3)(x, t) + 0.01 * jnp.sin(5 * jnp.tile(x, 2))  # noqa: E731
    sampler = Ancestral(DDPM(), 12)
    fast = jax.jit(lambda key: sampler(key, predict, 3, temperature))(keys(4))
    slow = ancestral_by_hand(keys(4), predict, 3, 12, temperature)
    np.testing.assert_allclose(fast, slow, rtol=1e-3, atol=1e-3)


def test_ddim_at_eta_one_is_ancestral():
    predict = gaussian_noise_predictor()
    one = Ancestral(FIXED, 30)(keys(6), predict, 3)
    other = DDIM(FIXED, 30, eta=1.0)(keys(6), predict, 3)
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_euler_against_slow_twin():
    x = np.stack([np.float64(jax.random.normal(jax.random.fold_in(k, 0), (3,))) for k in keys(4)])
    times = np.linspace(1, 0, 8)
    for now, after in zip(times[:-1], times[1:], strict=True):
        x = x + (after - now) * gaussian_velocity(x, 1000 * now)
    np.testing.assert_allclose(Euler(Flow(), 7)(keys(4), gaussian_velocity, 3), x, atol=1e-5)


SAMPLERS = [
    (Ancestral(DDPM(), 10), gaussian_noise_predictor(0.0)),
    (DDIM(DDPM(), 10, eta=0.5), gaussian_noise_predictor(0.0)),
    (Euler(Flow(), 10), gaussian_velocity),
]
each_sampler = pytest.mark.parametrize(
    ("sampler", "predict"), SAMPLERS, ids=lambda value: getattr(type(value), "__name__", "")
)


@each_sampler
def test_a_row_depends_on_its_key_alone(sampler, predict):
    run = jax.jit(lambda key: sampler(key, predict, 4))
    together = run(keys(6))
    alone = jnp.concatenate([run(key[None]) for key in keys(6)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    shuffled = run(keys(6)[::-1].reshape(2, 3))
    np.testing.assert_allclose(shuffled.reshape(6, 4)[::-1], together, atol=1e-5)
    assert len(np.unique(np.asarray(together))) == together.size


@each_sampler
def test_temperature(sampler, predict):
    """One compiled program for every temperature, also one per row; at 0 no noise is injected."""
    traces = []

    @jax.jit
    def run(key, temperature):
        traces.append(1)
        return sampler(key, predict, 4, temperature)

    cold, warm = run(keys(3), 0.0), run(keys(3), 1.0)
    assert len(traces) == 1
    assert np.max(np.abs(cold - warm)) > 0.1
    np.testing.assert_allclose(warm, sampler(keys(3), predict, 4), atol=1e-5)
    mixed = run(keys(3), jnp.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(mixed, jnp.stack([cold[0], warm[1], cold[2]]), atol=1e-5)
    np.testing.assert_array_equal(run(keys(3), 0.0), cold)


def test_cold_ancestral_sampling_draws_only_the_first_noise(monkeypatch):
    sampler, predict = SAMPLERS[0]
    cold = sampler(keys(3), predict, 4, 0.0)
    original = diffusion._row_noise
    monkeypatch.setattr(
        diffusion,
        "_row_noise",
        lambda key, i, dim: original(key, i, dim) * (1 if isinstance(i, int) else 7),
    )
    np.testing.assert_array_equal(sampler(keys(3), predict, 4, 0.0), cold)
    assert np.max(np.abs(sampler(keys(3), predict, 4, 1.0) - cold)) > 0.1


def test_clip_bounds_the_clean_token():
    """A wrong noise at the end of the chain is amplified by 1 / sqrt(alpha-bar)."""
    wrong = lambda x, t: gaussian_noise_predictor()(x, t) + 0.05  # noqa: E731
    free = DDIM(FIXED, 10)(keys(200), wrong, 2)
    clipped = DDIM(FIXED, 10, clip=3.0)(keys(200), wrong, 2)
    assert np.abs(free).max() > 50
    assert np.abs(clipped).max() <= 3
    right = gaussian_noise_predictor()
    np.testing.assert_allclose(
        DDIM(FIXED, 10, clip=100.0)(keys(50), right, 2),
        DDIM(FIXED, 10)(keys(50), right, 2),
        atol=1e-3,
    )


def test_guidance():
    """u + w (c - u) on the noise; the conditional's variance; w traced, also per row."""
    seen = []

    def both(x_1NC, t):
        seen.append((x_1NC.shape, t.shape))
        conditional = jnp.concatenate([2 * x_1NC, jnp.full_like(x_1NC, 0.5)], axis=-1)
        unconditional = jnp.concatenate([x_1NC, jnp.full_like(x_1NC, -0.5)], axis=-1)
        return jnp.concatenate([conditional, unconditional])

    x, t = jnp.ones((4, 3)), jnp.float32(7)
    for guidance, noise in [(1.0, 2.0), (0.0, 1.0), (3.0, 4.0)]:
        out = diffusion.guided(both, guidance, 3)(x, t)
        np.testing.assert_allclose(out[:, :3], noise)
        np.testing.assert_allclose(out[:, 3:], 0.5)
    assert set(seen) == {((1, 4, 3), ())}
    rows = jnp.array([0.0, 1.0, 2.0, 3.0])
    out = jax.jit(lambda w: diffusion.guided(both, w, 3)(x, t))(rows)
    np.testing.assert_allclose(out[:, 0], 1 + rows)


def test_guided_sampling_at_one_is_conditional_sampling():
    conditional = gaussian_noise_predictor(0.0)

    def both(x_1NC, t):
        out = conditional(x_1NC, t)
        return jnp.concatenate([out, -3 * out])

    sampler = Ancestral(DDPM(), 10)
    plain = sampler(keys(4), conditional, 3)
    at_one = sampler(keys(4), diffusion.guided(both, 1.0, 3), 3)
    np.testing.assert_allclose(plain, at_one, atol=1e-3)


def test_guidance_schedules():
    fraction = jnp.arange(1, 5) / 4
    np.testing.assert_allclose(diffusion.guidance_at("constant", 5.0, fraction), 5)
    linear = diffusion.guidance_at("linear", 5.0, fraction)
    np.testing.assert_allclose(linear, [2, 3, 4, 5])
    with pytest.raises(UserError, match="choose constant or linear"):
        diffusion.guidance_at("cosine", 5.0, fraction)


def test_construction_from_configs():
    process = diffusion.process_from(process="ddpm", vlb_weight=0.5)
    assert process == DDPM(vlb_weight=0.5)
    assert diffusion.sampler_from(process, steps=10) == Ancestral(process, 10)
    assert diffusion.sampler_from(process, "ddim", eta=0.1) == DDIM(process, eta=0.1)
    assert diffusion.sampler_from(Flow(), steps=5) == Euler(Flow(), 5)
    assert DDPM().outputs(16) == 32 and DDPM(learned_variance=False).outputs(16) == 16
    assert Flow().outputs(16) == 16
    with pytest.raises(UserError, match="'edm' here: choose one of ddpm, flow"):
        diffusion.process_from("edm")
    with pytest.raises(UserError, match="'flow' has no option vlb_weight: it has logit_mean"):
        diffusion.process_from("flow", vlb_weight=1.0)
    with pytest.raises(UserError, match="'ddim' here: choose one of euler"):
        diffusion.sampler_from(Flow(), "ddim")
    with pytest.raises(UserError, match="'euler' has no option eta: it has steps"):
        diffusion.sampler_from(Flow(), eta=0.0)
    with pytest.raises(UserError, match="set 1 or more"):
        Euler(Flow(), 0)(keys(1), gaussian_velocity, 2)
