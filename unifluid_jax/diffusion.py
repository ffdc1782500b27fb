"""Noise processes over image tokens as pure functions: times, targets, losses.

Two processes behind one interface: `DDPM`, MAR's, and `Flow`, flow matching. In both, time counts
noise: t = 0 is the clean token and the last time is (nearly) pure noise. A network enters as
`predict(x, t) -> out`, closed over its parameters and conditioning; t is in units of 0 .. 1000
whatever the process (of a `DDPM`: steps of its chain). All arithmetic is in float32, constants are
computed in float64.

    process = process_from(**config.diffusion)
    loss_N = process.loss(key, lambda x, t: head(x, t, z_ND), x_NC, draws=4)

The way back is in `samplers.py`.

Letters: N image tokens, any leading shape; C dims of an image token; R diffusion draws per token; S
diffusion steps; O outputs of the network, C or 2 C.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Real

from unifluid_jax.errors import UserError

Predict = Callable[[Array, Array], Array]
Constant = np.ndarray | Array


class Chain(NamedTuple):
    """Constants of a chain of Gaussian noising steps: a table of [S] each, or those of given steps.

    a is alpha-bar at a step, a' at the step before it, and b = 1 - a / a' (Ho et al. 2020).
    """

    time: Constant  # what the network is told: the step of the unrespaced chain
    signal: Constant  # sqrt(a): x_t = signal * x + noise * e
    noise: Constant  # sqrt(1 - a)
    clean_from_noisy: Constant  # sqrt(1 / a): x = clean_from_noisy * x_t - clean_from_noise * e
    clean_from_noise: Constant  # sqrt(1 / a - 1)
    mean_from_clean: Constant  # mean of the posterior: mean_from_clean * x + mean_from_noisy * x_t
    mean_from_noisy: Constant
    log_min: (
        Constant  # log of the posterior's variance, the least of a reverse step; at 0 that of 1
    )
    log_max: Constant  # log(b), the most
    signal_before: Constant  # sqrt(a')
    noise_before: Constant  # sqrt(1 - a')
    stochastic: Constant  # 1, but 0 at step 0: the last step of sampling adds no noise


class Process(abc.ABC):
    """A way from tokens to noise, and what a network must learn to walk it back."""

    @property
    @abc.abstractmethod
    def duration(self) -> int:
        """The time of pure noise, in the units in which the network is told."""

    @abc.abstractmethod
    def outputs(self, token_dim: int) -> int:
        """O, channels the network must return."""

    @abc.abstractmethod
    def times(self, key: jax.Array, shape: tuple[int, ...]) -> Real[Array, "..."]:
        """Random times to train at; along the first axis they are spread evenly, see `spread`."""

    @abc.abstractmethod
    def loss_at(
        self,
        predict: Predict,
        x: Float[Array, "*N C"],
        t: Real[Array, "*N"],
        noise: Float[Array, "*N C"],
    ) -> Float[Array, "*N"]:
        """Loss per token at given `times` and noise, mean over dims."""

    def loss(
        self, key: jax.Array, predict: Predict, x_NC: Float[Array, "*N C"], draws: int
    ) -> Float[Array, "*N"]:
        """Loss per token, mean over dims and over `draws` independent times and noises.

        `predict` is called once, on x_RNC and t_RN.
        """
        key_time, key_noise = jax.random.split(key)
        t_RN = self.times(key_time, (draws, *x_NC.shape[:-1]))
        noise_RNC = jax.random.normal(key_noise, (draws, *x_NC.shape))
        x_RNC = jnp.broadcast_to(x_NC[None], noise_RNC.shape)
        return self.loss_at(predict, x_RNC, t_RN, noise_RNC).mean(axis=0)


def spread(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Uniform in (0, 1), and one in each of R equal parts of it along the first axis.

    The draws of a token: their mean has the expectation of independent ones (MAR's) and less
    variance (the low-discrepancy sampler of Kingma et al. 2021; for this use our choice).
    """
    part = jnp.arange(shape[0], dtype=jnp.float32).reshape(-1, *(1,) * (len(shape) - 1))
    # Neither 0 nor 1, which float32 would make of a sum so near to it.
    u = jax.random.uniform(key, shape, minval=1e-6, maxval=1 - 1e-6)
    return jnp.clip((part + u) / shape[0], 1e-6, 1 - 1e-6)


@dataclasses.dataclass(frozen=True)
class DDPM(Process):
    """MAR's process: cosine schedule, noise prediction, variance learned in its possible range.

    The network returns C noise predictions and, with `learned_variance`, C variance logits v: the
    log variance of a reverse step is interpolated between its bounds at (v + 1) / 2 (Nichol and
    Dhariwal 2021). The squared error of the noise is 1 on average for a network that returns 0.

    Attributes:
        steps: length of the chain.
        learned_variance: False takes the posterior's variance, the lower bound (our choice: few
            steps want it small).
        vlb_weight: weight of the variational term that trains the variance, without effect on the
            predicted noise; 1 in MAR. 0 leaves the variance of a fresh network in the (geometric)
            middle of its range.
            At the last step, whose beta is cut to 0.999, the term of a fresh network is about 700
            bits per dim (MAR's too): one draw in a thousand makes the reported loss jump, but the
            variance has no range there and so no gradient to speak of.
    """

    steps: int = 1000
    learned_variance: bool = True
    vlb_weight: float = 1.0

    @property
    def duration(self) -> int:
        return self.steps

    def outputs(self, token_dim: int) -> int:
        return 2 * token_dim if self.learned_variance else token_dim

    def times(self, key: jax.Array, shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Steps of the chain, uniform."""
        return jnp.floor(spread(key, shape) * self.steps).astype(jnp.int32)

    def loss_at(
        self,
        predict: Predict,
        x: Float[Array, "*N C"],
        t: Int[Array, "*N"],
        noise: Float[Array, "*N C"],
    ) -> Float[Array, "*N"]:
        constants = _table(self.steps, tuple(range(self.steps)))
        chain = Chain(*(jnp.asarray(constant)[t][..., None] for constant in constants))
        x = x.astype(jnp.float32)
        noisy = chain.signal * x + chain.noise * noise
        out = predict(noisy, chain.time[..., 0]).astype(jnp.float32)
        loss = jnp.square(noise - out[..., : x.shape[-1]]).mean(axis=-1)
        if self.learned_variance and self.vlb_weight:
            loss += self.vlb_weight * self._vlb(chain, x, noisy, t, out)
        return loss

    def _vlb(self, chain: Chain, x: Array, noisy: Array, t: Array, out: Array) -> Array:
        """The term of the variational bound at step t, bits per dim.

        KL(q(x_{t-1} | x_t, x) || p(x_{t-1} | x_t)), and at step 0 the decoder's likelihood. The
        latter is MAR's, made for pixels in [-1, 1] with 256 levels; kept, for it is one draw in a
        thousand. The gradient reaches the variance logits alone.
        """
        dim = x.shape[-1]
        frozen = jax.lax.stop_gradient(out[..., :dim])
        out = jnp.concatenate([frozen, out[..., dim:]], axis=-1)
        mean, log_variance = self.reverse(chain, noisy, out)
        true_mean = chain.mean_from_clean * x + chain.mean_from_noisy * noisy
        kl = 0.5 * (
            log_variance
            - chain.log_min
            - 1
            + jnp.exp(chain.log_min - log_variance)
            + jnp.square(true_mean - mean) * jnp.exp(-log_variance)
        )
        nats = jnp.where(t[..., None] == 0, _pixel_nll(x, mean, log_variance), kl)
        return nats.mean(axis=-1) / math.log(2)

    def reverse(
        self, chain: Chain, x: Array, out: Array, clip: float | None = None
    ) -> tuple[Array, Array]:
        """Mean and log variance of p(x_{t-1} | x_t) from the network's output."""
        dim = x.shape[-1]
        clean, _ = self.denoise(chain, x, out, clip)
        mean = chain.mean_from_clean * clean + chain.mean_from_noisy * x
        if not self.learned_variance:
            return mean, jnp.broadcast_to(chain.log_min, mean.shape)
        fraction = (out[..., dim:] + 1) / 2
        return mean, fraction * chain.log_max + (1 - fraction) * chain.log_min

    def denoise(
        self, chain: Chain, x: Array, out: Array, clip: float | None
    ) -> tuple[Array, Array]:
        """The clean token and the noise the network believes in; together they make x_t."""
        noise = out[..., : x.shape[-1]].astype(jnp.float32)
        clean = chain.clean_from_noisy * x - chain.clean_from_noise * noise
        if clip is None:
            return clean, noise
        clean = jnp.clip(clean, -clip, clip)
        return clean, (chain.clean_from_noisy * x - clean) / chain.clean_from_noise

    def chain(self, steps: int) -> Chain:
        """Constants of the chain respaced to `steps`, float32 arrays of [S]."""
        return _table(self.steps, tuple(respaced(self.steps, steps)))


@dataclasses.dataclass(frozen=True)
class Flow(Process):
    """Flow matching on straight lines: x_t = (1 - t) x + t noise (rectified flow).

    The network predicts the velocity noise - x. The loss of a network that returns 0 is 1 + E[x^2],
    2 for normalised tokens. The network is told 1000 t.

    Attributes:
        logit_mean: mean of logit(t) in training; positive values train more on noisy tokens.
        logit_std: its standard deviation.
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0

    @property
    def duration(self) -> int:
        return 1000

    def outputs(self, token_dim: int) -> int:
        return token_dim

    def times(self, key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times in (0, 1), logit-normal."""
        normal = jax.scipy.special.ndtri(spread(key, shape))
        return jax.nn.sigmoid(self.logit_mean + self.logit_std * normal)

    def loss_at(
        self,
        predict: Predict,
        x: Float[Array, "*N C"],
        t: Float[Array, "*N"],
        noise: Float[Array, "*N C"],
    ) -> Float[Array, "*N"]:
        x = x.astype(jnp.float32)
        noisy = (1 - t[..., None]) * x + t[..., None] * noise
        out = predict(noisy, 1000 * t).astype(jnp.float32)
        return jnp.square(noise - x - out).mean(axis=-1)


_PROCESSES = {"ddpm": DDPM, "flow": Flow}


def process_from(process: str = "ddpm", **fields: Any) -> Process:
    """The process called "ddpm" or "flow" with these fields.

    Raises:
        UserError: no process has this name, or it has no such field.
    """
    return construct("diffusion process", _PROCESSES, process, fields)


def construct(
    kind: str, known: dict[str, type], name: str, fields: dict[str, Any], **fixed: Any
) -> Any:
    """The one of some dataclasses that has this name, with these fields.

    Raises:
        UserError: there is none, or it has no such field.
    """
    if name not in known:
        raise UserError(f"no {kind} called {name!r} here: choose one of {', '.join(known)}")
    allowed = [f.name for f in dataclasses.fields(known[name]) if f.name not in fixed]
    if unknown := sorted(set(fields) - set(allowed)):
        raise UserError(
            f"{kind} {name!r} has no option {', '.join(unknown)}: it has {', '.join(allowed)}"
        )
    return known[name](**fixed, **fields)


def cosine_betas(steps: int) -> Float[np.ndarray, " T"]:
    """Variances of noising steps, alpha-bar cos^2((t + 0.008) / 1.008 * pi / 2), at most 0.999."""
    edges = np.arange(steps + 1) / steps
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def respaced(steps: int, count: int) -> list[int]:
    """`count` evenly spaced steps of a chain, first and last included, as guided-diffusion.

    Raises:
        UserError: fewer than 2, or more than there are.
    """
    if not 2 <= count <= steps:
        raise UserError(f"{count} sampling steps of a chain of {steps}: set 2 to {steps}")
    stride, at, indices = (steps - 1) / (count - 1), 0.0, []
    for _ in range(count):
        indices.append(round(at))
        at += stride  # added up, not multiplied: the reference's rounding
    return indices


@functools.lru_cache
def _table(steps: int, indices: tuple[int, ...]) -> Chain:
    """Constants [S] of the chain that visits only `indices`: float64 arithmetic, float32 out."""
    after = np.cumprod(1 - cosine_betas(steps))[list(indices)]
    before = np.append(1.0, after[:-1])
    beta = 1 - after / before
    variance = beta * (1 - before) / (1 - after)
    chain = Chain(
        time=np.asarray(indices),
        signal=np.sqrt(after),
        noise=np.sqrt(1 - after),
        clean_from_noisy=np.sqrt(1 / after),
        clean_from_noise=np.sqrt(1 / after - 1),
        mean_from_clean=beta * np.sqrt(before) / (1 - after),
        mean_from_noisy=(1 - before) * np.sqrt(1 - beta) / (1 - after),
        log_min=np.log(np.append(variance[1], variance[1:])),
        log_max=np.log(beta),
        signal_before=np.sqrt(before),
        noise_before=np.sqrt(1 - before),
        stochastic=np.arange(len(indices)) > 0,
    )
    return Chain(*(constant.astype(np.float32) for constant in chain))


def _pixel_nll(x: Array, mean: Array, log_variance: Array) -> Array:
    """-log of a Gaussian's mass in the bin x +- 1/255, nats; bins at -1 and 1 are open (MAR)."""

    def cdf(value: Array) -> Array:  # the reference's approximation, not erf
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    inverse = jnp.exp(-0.5 * log_variance)
    above = cdf(inverse * (x - mean + 1 / 255))
    below = cdf(inverse * (x - mean - 1 / 255))
    mass = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return -jnp.log(jnp.maximum(mass, 1e-12))
