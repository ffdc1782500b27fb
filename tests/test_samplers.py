"""Samplers: slow float64 twins, analytic targets, orders of convergence, guidance."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.gaussian import (
    FIXED,
    MEAN,
    STD,
    alpha_bars,
    gaussian_noise_predictor,
    gaussian_velocity,
    keys,
)
from unifluid_jax import diffusion, samplers
from unifluid_jax.diffusion import DDPM, Flow
from unifluid_jax.errors import UserError
from unifluid_jax.samplers import DDIM, SDE, Ancestral, DPMSolver, Euler, Heun


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
        (DPMSolver(FIXED, 20), gaussian_noise_predictor(), 0.03),
        (Euler(Flow(), 100), gaussian_velocity, 0.03),
        (Heun(Flow(), 12), gaussian_velocity, 0.03),
        # A few steps come out narrow: the predicted clean token stands for all that there may be.
        (SDE(Flow(), 250), gaussian_velocity, 0.06),
    ],
    ids=["learned", "fixed", "ddim", "dpm", "euler", "heun", "sde"],
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
    (DPMSolver(DDPM(), 10), gaussian_noise_predictor(0.0)),
    (Euler(Flow(), 10), gaussian_velocity),
    (Heun(Flow(), 5), gaussian_velocity),
    (SDE(Flow(), 10, eta=0.5), gaussian_velocity),
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
    original = samplers._row_noise
    monkeypatch.setattr(
        samplers,
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
        out = samplers.guided(both, [guidance], 3)(x, t)
        np.testing.assert_allclose(out[:, :3], noise)
        np.testing.assert_allclose(out[:, 3:], 0.5)
    assert set(seen) == {((1, 4, 3), ())}
    rows = jnp.array([0.0, 1.0, 2.0, 3.0])
    out = jax.jit(lambda w: samplers.guided(both, [w], 3)(x, t))(rows)
    np.testing.assert_allclose(out[:, 0], 1 + rows)


def test_guided_sampling_at_one_is_conditional_sampling():
    conditional = gaussian_noise_predictor(0.0)

    def both(x_1NC, t):
        out = conditional(x_1NC, t)
        return jnp.concatenate([out, -3 * out])

    sampler = Ancestral(DDPM(), 10)
    plain = sampler(keys(4), conditional, 3)
    at_one = sampler(keys(4), samplers.guided(both, [1.0], 3), 3)
    np.testing.assert_allclose(plain, at_one, atol=1e-3)


def test_three_branches_are_mixed_as_instructpix2pix_does():
    x, t = jnp.ones((2, 3)), jnp.float32(7)
    outs = [jax.random.normal(key, (2, 3)) for key in keys(3)]
    mixed = samplers.guided(lambda x, t: jnp.stack(outs), [7.5, 1.5], 3)(x, t)
    both, image, none = outs
    expected = none + 1.5 * (image - none) + 7.5 * (both - image)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


@each_sampler
@pytest.mark.parametrize("interval", [(0.35, 0.75), (0.35, 1.0), (0.0, 0.75), (0.0, 1.0)])
def test_a_network_of_an_interval_is_run_within_it_alone(sampler, predict, interval):
    calls = {"inside": [], "outside": []}

    def network(name, sign):
        def run(x, t):
            jax.debug.callback(lambda t: calls[name].append(float(t)), t)
            return sign * predict(x, t)

        return run

    def chosen(x, t):  # both are run, and one is thrown away
        time = t / sampler.process.duration
        here = (interval[0] <= time) & (time <= interval[1])
        return jnp.where(here, predict(x, t), -predict(x, t))

    both = samplers.Within(interval, network("inside", 1), network("outside", -1))
    found = sampler(keys(4), both, 3)
    # The first clean token of a DDPM is a difference of numbers of the size of 2e4.
    np.testing.assert_allclose(found, sampler(keys(4), chosen, 3), rtol=1e-3, atol=5e-3)
    jax.effects_barrier()
    times = sampler.times
    here = (interval[0] <= times) & (times <= interval[1])
    for name, expected in (("inside", times[here]), ("outside", times[~here])):
        found = sorted(calls[name], reverse=True)  # callbacks come in no order
        np.testing.assert_allclose(found, expected * sampler.process.duration, rtol=1e-5)


def test_guidance_schedules():
    fraction = jnp.arange(1, 5) / 4
    at = lambda name, **given: samplers.guidance_at(name, 5.0, fraction, **given)  # noqa: E731
    np.testing.assert_allclose(at("constant"), 5)
    np.testing.assert_allclose(at("linear"), [2, 3, 4, 5])
    half = math.sqrt(0.5)
    np.testing.assert_allclose(at("cosine"), [3 - 2 * half, 3, 3 + 2 * half, 5], rtol=1e-6)
    np.testing.assert_allclose(at("power"), [1.25, 2, 3.25, 5])
    np.testing.assert_allclose(at("power", power=1.0), [2, 3, 4, 5])


def exact_ddpm(x):
    """Where the ODE of the chain takes the noise of N(MEAN, STD^2): its quantile stays the same."""
    bar = alpha_bars()[999]
    mean, std = math.sqrt(bar) * MEAN, math.sqrt(bar * STD**2 + 1 - bar)
    return MEAN + STD * (x - mean) / std


ORDERS = [
    # Sampler, network, grids, and about how the error must fall when steps are doubled.
    (lambda s: DDIM(FIXED, s), gaussian_noise_predictor(), (40, 80), 1.6),
    (lambda s: DPMSolver(FIXED, s), gaussian_noise_predictor(), (12, 24), 3.0),
    (lambda s: Euler(Flow(), s), gaussian_velocity, (16, 32), 1.7),
    (lambda s: Heun(Flow(), s), gaussian_velocity, (16, 32), 3.2),
]


@pytest.mark.parametrize(
    ("make", "predict", "grids", "factor"), ORDERS, ids=["ddim", "dpm", "euler", "heun"]
)
def test_errors_fall_with_the_order_of_the_method(make, predict, grids, factor):
    noise = np.stack([jax.random.normal(jax.random.fold_in(k, 0), (4,)) for k in keys(50)])
    exact = exact_ddpm(noise) if isinstance(make(4).process, DDPM) else MEAN + STD * noise
    error = [np.abs(make(s)(keys(50), predict, 4) - exact).mean() for s in grids]
    assert error[0] / error[1] > factor
    assert error[1] < 0.02


def test_second_order_needs_fewer_steps():
    def narrow(sampler, predict):
        return abs(np.std(sampler(keys(2000), predict, 4)) - STD)

    noise = gaussian_noise_predictor()
    assert narrow(DPMSolver(FIXED, 12), noise) < narrow(DDIM(FIXED, 12), noise) / 2
    same_cost = (Heun(Flow(), 8), Euler(Flow(), 15))
    assert len(same_cost[0].times) == len(same_cost[1].times) == 15
    assert narrow(same_cost[0], gaussian_velocity) < narrow(same_cost[1], gaussian_velocity) / 2


def mixture_velocity(x, t):
    """E[noise - x | x_t] for tokens of -1 or 1, each with a spread of 0.1: two far modes."""
    t, spread = t / 1000, 0.1
    variance = (1 - t) ** 2 * spread**2 + t**2
    gain = (1 - t) * spread**2 / variance

    def clean(center):
        return center + gain * (x - (1 - t) * center)

    weight = jax.nn.sigmoid(2 * x * (1 - t) / variance)
    best = weight * clean(1.0) + (1 - weight) * clean(-1.0)
    return (x - best) / t


@pytest.mark.parametrize("sampler", [Euler(Flow(), 60), Heun(Flow(), 30), SDE(Flow(), 120)])
def test_samples_of_a_mixture_fall_into_its_modes(sampler):
    x = np.asarray(jax.jit(lambda key: sampler(key, mixture_velocity, 1))(keys(4000)))
    near = np.minimum(np.abs(x - 1), np.abs(x + 1))
    assert (near < 0.4).mean() > 0.99
    assert (x > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert np.sqrt(np.square(near).mean()) == pytest.approx(0.1, abs=0.02)


def noises(key, count, dim):
    """The draws of a key: the initial noise, then those of the steps."""
    return [np.float64(jax.random.normal(jax.random.fold_in(key, i), (dim,))) for i in range(count)]


def test_heun_against_slow_twin():
    times = np.linspace(1, 0, 6)
    for key, fast in zip(keys(3), Heun(Flow(), 5)(keys(3), gaussian_velocity, 3, 0.7), strict=True):
        x = 0.7 * noises(key, 1, 3)[0]
        for now, after in zip(times[:-1], times[1:], strict=True):
            v = gaussian_velocity(x, 1000 * now)
            if after > 0:
                v = (v + gaussian_velocity(x + (after - now) * v, 1000 * after)) / 2
            x = x + (after - now) * v
        np.testing.assert_allclose(fast, x, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sde_against_slow_twin(eta):
    steps, cold = 6, 0.8
    found = SDE(Flow(), steps, eta=eta)(keys(3), gaussian_velocity, 3, cold)
    for key, fast in zip(keys(3), found, strict=True):
        x, *draws = noises(key, steps + 1, 3)
        for s in reversed(range(steps)):
            t, after = (s + 1) / steps, s / steps
            v = gaussian_velocity(x, 1000 * t)
            clean, noise = x - t * v, x + (1 - t) * v
            # Posterior of the path by the product of Gaussian densities, as in `posterior`.
            gain = (1 - t) / (1 - after)
            added = t**2 - gain**2 * after**2
            variance = added * after**2 / t**2
            sigma = eta * math.sqrt(variance)
            x = (1 - after) * clean + math.sqrt(after**2 - sigma**2) * noise
            x = x + cold * sigma * draws[s]
        np.testing.assert_allclose(fast, x, atol=1e-5)


def test_sde_without_noise_is_euler():
    ours = SDE(Flow(), 9, eta=0.0)(keys(4), gaussian_velocity, 3)
    np.testing.assert_allclose(ours, Euler(Flow(), 9)(keys(4), gaussian_velocity, 3), atol=1e-5)


def test_dpm_against_slow_twin():
    steps, predict = 6, gaussian_noise_predictor()
    indices = diffusion.respaced(1000, steps)
    bars = alpha_bars()[indices]
    rate = 0.5 * np.log(bars / (1 - bars))  # log of signal over noise
    for key, fast in zip(keys(3), DPMSolver(FIXED, steps)(keys(3), predict, 3), strict=True):
        x, last = noises(key, 1, 3)[0], None
        for s in reversed(range(steps)):
            noise = np.float64(predict(jnp.float32(x), jnp.float32(indices[s])))
            clean = (x - np.sqrt(1 - bars[s]) * noise) / np.sqrt(bars[s])
            if s == 0:
                x = clean
                break
            h, target = rate[s - 1] - rate[s], clean
            if last is not None:
                r = max((rate[s] - rate[s + 1]) / h, 1.0)
                target = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * last
            x = np.sqrt((1 - bars[s - 1]) / (1 - bars[s])) * x
            x = x - np.sqrt(bars[s - 1]) * np.expm1(-h) * target
            last = clean
        # The first clean token is a difference of numbers of the size of 2e4.
        np.testing.assert_allclose(fast, x, atol=5e-3)


@each_sampler
def test_the_network_is_asked_as_often_as_said(sampler, predict):
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return predict(x, t)

    sampler(keys(2), counted, 3)
    jax.effects_barrier()
    np.testing.assert_allclose(calls, sampler.times * sampler.process.duration, rtol=1e-5)
    assert len(calls) == (9 if isinstance(sampler, Heun) else 10)
    assert sampler.with_steps(4) == dataclasses.replace(sampler, steps=4)


def test_construction():
    process = DDPM(vlb_weight=0.5)
    assert samplers.sampler_from(process, steps=10) == Ancestral(process, 10)
    assert samplers.sampler_from(process, "ddim", eta=0.1) == DDIM(process, eta=0.1)
    assert samplers.sampler_from(process, "dpm", clip=4.0) == DPMSolver(process, clip=4.0)
    assert samplers.sampler_from(Flow(), steps=5) == Euler(Flow(), 5)
    assert samplers.sampler_from(Flow(), "heun") == Heun(Flow())
    assert samplers.sampler_from(Flow(), "sde", eta=0.3) == SDE(Flow(), eta=0.3)
    with pytest.raises(UserError, match="'ddim' here: choose one of euler, heun, sde"):
        samplers.sampler_from(Flow(), "ddim")
    with pytest.raises(UserError, match="'euler' has no option eta: it has steps"):
        samplers.sampler_from(Flow(), eta=0.0)
    for name in ("euler", "heun", "sde"):
        with pytest.raises(UserError, match="0 sampling steps: set 1 or more"):
            samplers.sampler_from(Flow(), name, steps=0)
    for name in ("ddpm", "ddim", "dpm"):
        with pytest.raises(UserError, match="1 sampling steps of a chain of 1000: set 2 to 1000"):
            samplers.sampler_from(process, name, steps=1)
