"""The per-token diffusion head: an MLP that denoises an image token given the backbone's output.

The network of MAR: residual MLP blocks under adaptive LayerNorm, conditioned on y = time + z.

Letters: N image tokens; C dims of an image token; D model width; R diffusion draws per token; G
branches of guidance; W width of the head; O outputs, C or 2 C.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from unifluid_jax import sharding
from unifluid_jax.models.functional import Initializer, stack, unstack

_XAVIER = nnx.initializers.xavier_uniform()
_ZEROS = nnx.initializers.zeros_init()
_TIME = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Sizes of a diffusion head.

    MAR's, depth x width: 3 x 1024 (default), 6 x 1024, 8 x 1280, 12 x 1536.

    Attributes:
        token_dim: C.
        cond_dim: D, width of the backbone.
        width: W.
        depth: number of residual blocks.
        out_dim: O, `process.outputs(token_dim)` of the diffusion process.
        time_dim: size of the sinusoid that embeds the time, even.
        dtype: compute type; the output is float32 whatever it is.
    """

    token_dim: int
    cond_dim: int
    width: int
    depth: int
    out_dim: int
    time_dim: int = 256
    dtype: str = "float32"


class DiffusionHead(nnx.Module):
    """The denoising network. A fresh one returns zeros: the first loss of noise prediction is 1.

    Logical axes: "head_width" is the residual stream, "head_mlp" the hidden layers and the
    conditioning vector y.
    """

    def __init__(self, config: HeadConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.config = config
        self.token_in = _linear(config.token_dim, width, (None, "head_width"), _XAVIER, dtype, rngs)
        self.cond_in = _linear(config.cond_dim, width, ("embed", "head_mlp"), _XAVIER, dtype, rngs)
        self.time_in = _linear(config.time_dim, width, (None, "head_width"), _TIME, dtype, rngs)
        self.time_out = _linear(width, width, ("head_width", "head_mlp"), _TIME, dtype, rngs)
        self.blocks = stack(lambda r: Block(width, dtype, rngs=r), config.depth, rngs)
        self.final_norm = _norm(width, False, dtype, rngs)
        self.final_modulation = _linear(
            width, 2 * width, ("head_mlp", "head_width"), _ZEROS, dtype, rngs
        )
        # Accumulated and returned in float32. Early in sampling the cosine schedule multiplies an
        # error of the predicted noise by more than 100: rounding the prediction to bfloat16 would
        # be an error of the order of the token itself.
        self.final_out = _linear(
            width, config.out_dim, ("head_width", None), _ZEROS, dtype, rngs, jnp.dtype(jnp.float32)
        )

    def __call__(
        self, x: Float[Array, "*x C"], t: Real[Array, "*t"], z: Float[Array, "*z D"]
    ) -> Float[Array, "*out O"]:
        """The head's output for noisy tokens.

        The three leading shapes broadcast against each other, by numpy's rules. Every input passes
        its own linear at its own shape: `x_RNC, t_RN, z_ND` projects z once for all draws; `x_1NC,
        t, z_GND` embeds the one time and projects the shared tokens of both branches of guidance
        once.

        Args:
            x: noisy tokens.
            t: time of the process in [0, 1000].
            z: outputs of the backbone.
        """
        parts = sharding.gathered(self, self.config.dtype)
        rank = max(x.ndim, t.ndim + 1, z.ndim)
        time = _sinusoid(t.astype(jnp.float32), self.config.time_dim)
        time = parts.time_out(jax.nn.silu(parts.time_in(time)))
        y = jax.nn.silu(_lift(time, rank) + _lift(parts.cond_in(z), rank))
        h = _lift(parts.token_in(x), rank)
        for block in unstack(parts.blocks, self.config.depth):
            h = block(h, y)
        shift, scale = jnp.split(parts.final_modulation(y), 2, axis=-1)
        return parts.final_out(parts.final_norm(h) * (1 + scale) + shift)


class Block(nnx.Module):
    """A residual MLP: modulated LayerNorm, linear, SiLU, linear, gate; at first the identity."""

    def __init__(self, width: int, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        self.norm = _norm(width, True, dtype, rngs)
        self.mlp_in = _linear(width, width, ("head_width", "head_mlp"), _XAVIER, dtype, rngs)
        self.mlp_out = _linear(width, width, ("head_mlp", "head_width"), _XAVIER, dtype, rngs)
        self.modulation = _linear(width, 3 * width, ("head_mlp", "head_width"), _ZEROS, dtype, rngs)

    def __call__(self, h: Float[Array, "*h W"], y: Float[Array, "*y W"]) -> Float[Array, "*hy W"]:
        """One block; `y` has been through its SiLU, which all blocks share."""
        shift, scale, gate = jnp.split(self.modulation(y), 3, axis=-1)
        inner = self.norm(h) * (1 + scale) + shift
        return h + gate * self.mlp_out(jax.nn.silu(self.mlp_in(inner)))


def _linear(
    inputs: int,
    outputs: int,
    axes: tuple[str | None, str | None],
    init: Initializer,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    out_dtype: jnp.dtype | None = None,
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=init,
        dtype=dtype,
        preferred_element_type=out_dtype,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
    )


def _norm(width: int, affine: bool, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        width,
        epsilon=1e-6,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where |mean| >> std
        dtype=dtype,
        scale_metadata={"axes": ("head_width",)},
        bias_metadata={"axes": ("head_width",)},
        rngs=rngs,
    )


def _sinusoid(t: Float[Array, "*t"], dim: int) -> Float[Array, "*t dim"]:
    """Cosines, then sines, of dim / 2 frequencies from 1 down towards 1 / 10000 (MAR)."""
    half = dim // 2
    frequency = jnp.exp(-math.log(10_000) / half * jnp.arange(half, dtype=jnp.float32))
    phase = t[..., None] * frequency.reshape((1,) * t.ndim + (-1,))
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)


def _lift(x: Array, rank: int) -> Array:
    """Leading axes of size 1 up to `rank`: broadcasting of ranks, in the open."""
    return x.reshape((1,) * (rank - x.ndim) + x.shape)
