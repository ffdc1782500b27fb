"""Samplers: from noise back to tokens, as one compiled loop each, behind one interface.

A network enters as in `diffusion.py`, as `predict(x, t) -> out`.

    sampler = sampler_from(process, "ddim", steps=50)
    predict = guided(lambda x, t: head(x, t, z_GND), (guidance,), C)
    x_NC = sampler(key_N, predict, C, temperature)

A sampler is called per batch of rows, with a key per row: the noise of a row depends on its key
alone, so that a picture does not depend on the batch around it. Guidance and temperature, scalars
or one per row, are traced; the number of steps is static. Of two networks for different times, see
`Within`, each has loops of its own, and costs nothing outside of them.

| name | process | evaluations of the network | noise at the steps |
|---|---|---|---|
| ddpm | DDPM | S | yes: MAR's |
| ddim | DDPM | S | none, or a fraction eta |
| dpm | DDPM | S | none; second order |
| euler | Flow | S | none |
| heun | Flow | 2 S - 1 | none; second order |
| sde | Flow | S | yes |

Letters: N image tokens, any leading shape; C dims of an image token; S diffusion steps; G branches
of guidance, the most conditional first; O outputs of the network, C or 2 C.
"""

import abc
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from unifluid_jax.diffusion import DDPM, Chain, Constant, Flow, Predict, Process, construct
from unifluid_jax.errors import UserError


class Within(NamedTuple):
    """One network inside an interval of diffusion time, 0 (clean) to 1 (noise), another outside."""

    interval: tuple[float, float]
    inside: Predict
    outside: Predict


class Sampler(abc.ABC):
    """A way back from noise to tokens.

    Attributes:
        process: that the network was trained for.
        steps: S.
    """

    process: Process
    steps: int

    @abc.abstractmethod
    def __call__(
        self, key_N: jax.Array, predict: Predict | Within, dim: int, temperature: ArrayLike = 1.0
    ) -> Float[Array, "*N C"]:
        """Tokens for a key per row; `predict` is called on x_NC and a scalar time."""

    @property
    @abc.abstractmethod
    def times(self) -> Float[np.ndarray, " E"]:
        """The times at which `predict` is called, 0 (clean) to 1 (noise), falling."""

    def with_steps(self, steps: int) -> "Sampler":
        """The same with another number of steps.

        Raises:
            UserError: it cannot do with so few, or so many.
        """
        return dataclasses.replace(self, steps=steps)


class _ChainSampler(Sampler):
    """Down the respaced chain of a `DDPM`."""

    process: DDPM

    def __post_init__(self):
        self.process.chain(self.steps)  # knows how many there can be

    @property
    def times(self) -> Float[np.ndarray, " E"]:
        return self._times[::-1]

    @property
    def _times(self) -> Float[np.ndarray, "S"]:
        return self.process.chain(self.steps).time / self.process.duration


@dataclasses.dataclass(frozen=True)
class Ancestral(_ChainSampler):
    """DDPM's own sampler, as in MAR: draws from p(x_{t-1} | x_t) down the respaced chain.

    Temperature multiplies the noise injected at the steps, not the initial noise: 0 still varies
    with the key.

    Attributes:
        steps: S.
        clip: bound on the predicted clean token; None in MAR. The first step multiplies the error
            of the predicted noise by 1 / sqrt(alpha-bar) = 2e4, which takes a long training to
            bear: a head of 600 steps made samples of standard deviation 1000 without a bound,
            and right ones with a bound of 3 to 5 standard deviations of the tokens.
    """

    process: DDPM
    steps: int = 100
    clip: float | None = None

    def __call__(
        self, key_N: jax.Array, predict: Predict | Within, dim: int, temperature: ArrayLike = 1.0
    ) -> Float[Array, "*N C"]:
        scale = _per_row(temperature)

        def step(predict: Predict, x: Array, chain: Chain, draw: Callable[[], Array]) -> Array:
            out = predict(x, chain.time).astype(jnp.float32)
            mean, log_variance = self.process.reverse(chain, x, out, self.clip)
            return mean + chain.stochastic * scale * jnp.exp(0.5 * log_variance) * draw()

        chain = self.process.chain(self.steps)
        return _descend(step, predict, self._times, key_N, _first(key_N, dim), chain, dim)


@dataclasses.dataclass(frozen=True)
class DDIM(_ChainSampler):
    """Song et al. 2021: from the chain's deterministic twin (eta 0) to itself (eta 1).

    For few steps. Temperature as in `Ancestral`: at eta 0 there is nothing for it to scale. Learned
    variances are not used.

    Attributes:
        steps: S.
        eta: fraction of the posterior's standard deviation that is injected as noise.
        clip: as in `Ancestral`.
    """

    process: DDPM
    steps: int = 50
    eta: float = 0.0
    clip: float | None = None

    def __call__(
        self, key_N: jax.Array, predict: Predict | Within, dim: int, temperature: ArrayLike = 1.0
    ) -> Float[Array, "*N C"]:
        scale = _per_row(temperature)

        def step(predict: Predict, x: Array, chain: Chain, draw: Callable[[], Array]) -> Array:
            clean, noise = self.process.denoise(chain, x, predict(x, chain.time), self.clip)
            if self.eta == 0:
                return chain.signal_before * clean + chain.noise_before * noise
            sigma = self.eta * chain.stochastic * jnp.exp(0.5 * chain.log_min)
            kept = jnp.sqrt(jnp.maximum(jnp.square(chain.noise_before) - jnp.square(sigma), 0))
            return chain.signal_before * clean + kept * noise + scale * sigma * draw()

        chain = self.process.chain(self.steps)
        return _descend(step, predict, self._times, key_N, _first(key_N, dim), chain, dim)


class _Multistep(NamedTuple):
    """Coefficients [S] of DPM-Solver++(2M).

    x_before = of_x * x + of_clean * ((1 + weight) * x0 - weight * x0_last).
    """

    of_x: Constant
    of_clean: Constant
    weight: Constant  # 0 where there is no last prediction, and in the last step


@dataclasses.dataclass(frozen=True)
class DPMSolver(_ChainSampler):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095): the chain's ODE to second order.

    It extrapolates the clean token from this step's prediction and the last one's, in the log of
    the signal-to-noise ratio. The first and the last step are of first order, as is usual for few
    steps. For 5 to 20 steps; temperature multiplies the initial noise, the only one.

    Attributes:
        steps: S.
        clip: as in `Ancestral`.
    """

    process: DDPM
    steps: int = 15
    clip: float | None = None

    def __call__(
        self, key_N: jax.Array, predict: Predict | Within, dim: int, temperature: ArrayLike = 1.0
    ) -> Float[Array, "*N C"]:
        chain = self.process.chain(self.steps)

        def step(
            predict: Predict,
            state: tuple[Array, Array],
            inputs: tuple[Chain, _Multistep],
            draw: Any,
        ) -> tuple[Array, Array]:
            del draw
            (x, last), (chain, solver) = state, inputs
            clean, _ = self.process.denoise(chain, x, predict(x, chain.time), self.clip)
            target = clean + solver.weight * (clean - last)
            return solver.of_x * x + solver.of_clean * target, clean

        x_NC = _per_row(temperature) * _first(key_N, dim)
        inputs = (chain, self._coefficients(chain))
        start = (x_NC, jnp.zeros_like(x_NC))
        return _descend(step, predict, self._times, key_N, start, inputs, dim)[0]

    @staticmethod
    def _coefficients(chain: Chain) -> _Multistep:
        signal, noise = (np.asarray(x, np.float64) for x in (chain.signal, chain.noise))
        before, noise_before = (np.append(first, x[:-1]) for first, x in ((1, signal), (0, noise)))
        with np.errstate(divide="ignore"):
            # Of the log of signal over noise: infinite in the last step, which ends without noise.
            stride = np.log(before / noise_before) - np.log(signal / noise)
        ratio = np.append(stride[1:], np.inf) / stride
        # Strides of this chain grow at its ends, threefold in few steps: extrapolated that far, 10
        # steps are worse than DDIM's. So never further than over equal strides (ours).
        weight = np.where(np.isfinite(ratio) & (ratio > 0), 0.5 / np.maximum(ratio, 1), 0)
        coefficients = (noise_before / noise, before * -np.expm1(-stride), weight)
        return _Multistep(*(x.astype(np.float32) for x in coefficients))


class _FlowSampler(Sampler):
    """In equal steps of a `Flow` from t = 1 to 0."""

    process: Flow

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"{self.steps} sampling steps: set 1 or more")

    @property
    def times(self) -> Float[np.ndarray, " E"]:
        return self._grid()[::-1]

    def _grid(self) -> Float[np.ndarray, "S"]:
        """The times at which steps begin, rising: the first is one step from 0."""
        return (np.arange(1, self.steps + 1) / self.steps).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Euler(_FlowSampler):
    """Euler's method on a flow.

    The only noise is the initial one, so that is what the temperature multiplies (our choice): at 0
    the key has no effect.
    """

    process: Flow
    steps: int = 25

    def __call__(
        self, key_N: jax.Array, predict: Predict | Within, dim: int, temperature: ArrayLike = 1.0
    ) -> Float[Array, "*N C"]:
        def step(predict: Predict, x: Array, t: Array, draw: Callable[[], Array]) -> Array:
            del draw
            return x - _velocity(predict, x, t) / self.steps

        x_NC = _per_row(temperature) * _first(key_N, dim)
        return _descend(step, predict, self._grid(), key_N, x_NC, self._grid(), dim)


@dataclasses.dataclass(frozen=True)
class Heun(_FlowSampler):
    """Heun's second-order method on a flow; two evaluations a step.

    The last step is Euler's (as in EDM): its second evaluation would be at t = 0, where a network
    has learned nothing. Temperature as in `Euler`.
    """

    process: Flow
    steps: int = 8

    @property
    def times(self) -> Float[np.ndarray, " E"]:
        grid = self._grid()[::-1]
        return np.append(np.stack([grid[:-1], grid[1:]], axis=1).ravel(), grid[-1])

    def __call__(
        self, key_N: jax.Array, predict: Predict | Within, dim: int, temperature: ArrayLike = 1.0
    ) -> Float[Array, "*N C"]:
        grid = self._grid()

        def step(
            predict: Predict, after: Predict, x: Array, t: Array, draw: Callable[[], Array]
        ) -> Array:
            del draw
            v = _velocity(predict, x, t)
            v_after = _velocity(after, x - v / self.steps, t - 1 / self.steps)
            return x - (v + v_after) / (2 * self.steps)

        x_NC = _per_row(temperature) * _first(key_N, dim)
        if self.steps > 1:
            times = np.stack([grid[1:], grid[:-1]], axis=1)
            x_NC = _descend(step, predict, times, key_N, x_NC, grid[1:], dim)
        return x_NC - _velocity(_network(predict, grid[0]), x_NC, grid[0]) / self.steps


@dataclasses.dataclass(frozen=True)
class SDE(_FlowSampler):
    """The stochastic twin of a flow: at eta 1, ancestral sampling on the flow's own path.

    A step draws from q(x_s | x_t, x) with the predicted clean token for x: the posterior of the
    Gaussian path x_t = (1 - t) x + t noise, as `Ancestral` does on a DDPM's. Its marginals are
    those of the flow. At eta 0 it is Euler's method. Temperature multiplies the noise injected.

    Attributes:
        steps: S.
        eta: fraction of the posterior's standard deviation that is injected as noise.
    """

    process: Flow
    steps: int = 50
    eta: float = 1.0

    def __call__(
        self, key_N: jax.Array, predict: Predict | Within, dim: int, temperature: ArrayLike = 1.0
    ) -> Float[Array, "*N C"]:
        scale = _per_row(temperature)

        def step(predict: Predict, x: Array, t: Array, draw: Callable[[], Array]) -> Array:
            after = t - 1 / self.steps
            velocity = _velocity(predict, x, t)
            clean, noise = x - t * velocity, x + (1 - t) * velocity
            # Rounding leaves the last `after` a little off 0.
            after = jnp.where(after < 0.5 / self.steps, 0.0, after)
            unlike = 1 - jnp.square((1 - t) * after / ((1 - after) * t))
            sigma = self.eta * after * jnp.sqrt(jnp.maximum(unlike, 0))
            kept = jnp.sqrt(jnp.maximum(jnp.square(after) - jnp.square(sigma), 0))
            return (1 - after) * clean + kept * noise + scale * sigma * draw()

        grid = self._grid()
        return _descend(step, predict, grid, key_N, _first(key_N, dim), grid, dim)


# The first sampler of a process is its default.
_SAMPLERS = {
    DDPM: {"ddpm": Ancestral, "ddim": DDIM, "dpm": DPMSolver},
    Flow: {"euler": Euler, "heun": Heun, "sde": SDE},
}


def sampler_from(process: Process, name: str | None = None, **fields: Any) -> Sampler:
    """The sampler of this name, see the table above; by default the first of its process.

    Raises:
        UserError: the process has no sampler of this name, or the sampler no such field, or cannot
            do with so few steps.
    """
    samplers = _SAMPLERS[type(process)]
    name = name or next(iter(samplers))
    return construct("sampler", samplers, name, fields, process=process)


def guided(predict: Predict, guidance: Sequence[ArrayLike], dim: int) -> Predict:
    """Classifier-free guidance on the first `dim` outputs.

    Of two branches, conditional c and unconditional u: u + w (c - u). Of more, from the most to the
    least conditional, one scale for each step of it; of three, (text and image, image, none), this
    is InstructPix2Pix's rule. All branches see the same x_t. Variance logits, where there are any,
    stay those of the first branch (MAR).

    Args:
        predict: called once, on x_1NC and t; returns out_GNO.
        guidance: G - 1 scales, each a scalar or of shape [*N], traced. All 1 is the first branch
            alone, at the price of all.
    """
    scales = [_per_row(scale) for scale in guidance]

    def combined(x_NC: Array, t: Array) -> Array:
        out_GNO = predict(x_NC[None], t)
        means = out_GNO[..., :dim]
        mixed = means[-1]
        for i, scale in enumerate(scales):
            mixed += scale * (means[i] - means[i + 1])
        return jnp.concatenate([mixed, out_GNO[0, ..., dim:]], axis=-1)

    return combined


# Of guidance over the tokens: from 0 to 1 over the fraction f, with a power p.
SCHEDULES: dict[str, Callable[[Array, float], Array]] = {
    "constant": lambda f, p: jnp.ones_like(f),
    "linear": lambda f, p: f,
    "cosine": lambda f, p: (1 - jnp.cos(math.pi * f)) / 2,
    "power": lambda f, p: f**p,
}


def guidance_at(
    schedule: str, guidance: ArrayLike, fraction: ArrayLike, power: float = 2.0
) -> Array:
    """Guidance while an image is being made.

    Args:
        schedule: one of `SCHEDULES`: "constant"; or from 1 up to w as f grows, "linear" (MAR):
            1 + (w - 1) f, "cosine": 1 + (w - 1) (1 - cos(pi f)) / 2, "power": 1 + (w - 1) f^power.
        guidance: w, reached at the last token.
        fraction: f, of the image's tokens, those done once the present ones are: (i + 1) / N for
            the i-th alone, as in MAR.
        power: exponent of "power".
    """
    guidance, fraction = jnp.asarray(guidance), jnp.asarray(fraction)
    return 1 + (guidance - 1) * SCHEDULES[schedule](fraction, power)


def _network(predict: Predict | Within, time: ArrayLike) -> Predict:
    """That of a time, 0 (clean) to 1 (noise)."""
    if not isinstance(predict, Within):
        return predict
    low, high = predict.interval
    return predict.inside if low <= time <= high else predict.outside


def _velocity(predict: Predict, x: Array, t: ArrayLike) -> Array:
    return predict(x, 1000 * jnp.asarray(t)).astype(jnp.float32)


def _descend(
    step: Callable[..., Any],
    predict: Predict | Within,
    times: Float[np.ndarray, "S ..."],
    key: Array,
    state: Any,
    constants: Any,
    dim: int,
) -> Any:
    """Runs `step(*networks, state, constant, draw)` over the [S] constants from the last to the
    first, in a loop for each run of steps that have the same networks.

    `draw()` is noise. Step s of row n draws from key n folded with s + 1 (0 is the initial noise).

    Args:
        times: of the evaluations of a step, [S] or [S, E]; `step` is given a network for each.
    """
    networks = [tuple(_network(predict, time) for time in np.atleast_1d(each)) for each in times]
    inputs = (np.arange(len(times)), constants)
    for chosen, run in itertools.groupby(reversed(inputs[0]), key=networks.__getitem__):

        def body(state: Any, inputs: tuple[Array, Any], chosen: tuple = chosen) -> tuple[Any, None]:
            index, constant = inputs
            return step(*chosen, state, constant, lambda: _row_noise(key, index + 1, dim)), None

        part = np.array(list(run))
        state, _ = jax.lax.scan(body, state, jax.tree.map(operator.itemgetter(part), inputs))
    return state


def _first(key: Array, dim: int) -> Array:
    return _row_noise(key, 0, dim)


def _row_noise(key: Array, index: ArrayLike, dim: int) -> Array:
    """Standard normal [*N, C] from a key per row and the index of a draw."""
    draw = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), (dim,)))
    return draw(key.reshape(-1)).reshape(*key.shape, dim)


def _per_row(value: ArrayLike) -> Array:
    """A scalar, or a value per row made to broadcast over the row's dims."""
    value = jnp.asarray(value, jnp.float32)
    return value[..., None] if value.ndim else value
