"""KL autoencoder with Stable Diffusion's architecture (`AutoencoderKL`).

Pictures to continuous image tokens and back.

UniFluid takes image tokens from a Stable-Diffusion-type VAE; grouping `patch` x `patch` latents
into one token is MAR's and Fluid's way and our choice here. SD at 256 px: 32 x 32 x 4 latents,
2 x 2 grouped, 256 tokens of 16 dims. MAR's KL-16: 16 x 16 x 16, patch 1 (`presets.py` has both).

Letters: B pictures, H W pixels, h w latents' grid, z latent channels, N = (h / patch) (w / patch)
tokens, C = patch^2 z dims of a token. Pixels are in [-1, 1]. Parameters carry the names of
diffusers' `AutoencoderKL`, kernels in HWIO.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from unifluid_jax import sharding
from unifluid_jax.models.functional import param

_conv_init = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_zeros = jax.nn.initializers.zeros
_ones = jax.nn.initializers.ones


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of the autoencoder; the defaults are those of SD 1.x and 2.x.

    Attributes:
        image_size: side of the pictures, pixels.
        channels: width of the first level; level i has `channels * multipliers[i]`.
        multipliers: one entry per level; each level but the last halves the resolution.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        encoder_attention, decoder_attention: levels whose residual blocks are each followed by
            attention, counted from the pictures' side (SD: none; MAR's KL-16: the encoder's last).
        latent_channels: z.
        groups: groups of every GroupNorm.
        patch: side of the square of latents grouped into one token.
        dtype: compute type; parameters are float32.
    """

    image_size: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    encoder_attention: tuple[int, ...] = ()
    decoder_attention: tuple[int, ...] = ()
    latent_channels: int = 4
    groups: int = 32
    patch: int = 2
    dtype: str = "float32"

    @property
    def grid(self) -> int:
        """Tokens along one side of a picture."""
        return self.image_size // 2 ** (len(self.multipliers) - 1) // self.patch

    @property
    def image_tokens(self) -> int:
        """N, tokens of a picture."""
        return self.grid**2

    @property
    def token_dim(self) -> int:
        """C, dims of a token."""
        return self.patch**2 * self.latent_channels


class Conv(nnx.Module):
    """3 x 3 or 1 x 1 convolution, NHWC, "same" unless strided."""

    def __init__(self, inputs: int, outputs: int, size: int, *, rngs: nnx.Rngs, init=_conv_init):
        self.kernel = param(
            init, rngs.params(), (size, size, inputs, outputs), (None, None, "conv_in", "conv_out")
        )
        self.bias = param(_zeros, rngs.params(), (outputs,), ("conv_out",))

    def __call__(self, x: jax.Array, stride: int = 1, padding="SAME") -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...].astype(x.dtype)[None, None, None]


class GroupNorm(nnx.Module):
    """GroupNorm over NHWC, statistics in float32, eps 1e-6."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.groups = groups
        self.scale = param(_ones, rngs.params(), (channels,), ("conv_out",))
        self.bias = param(_zeros, rngs.params(), (channels,), ("conv_out",))

    def __call__(self, x: jax.Array) -> jax.Array:
        # Moments per channel first, in one pass and with the channels contiguous; groups are joined
        # on [B, channels].
        y = x.astype(jnp.float32)
        mean, square = (self._over_groups(m.mean((1, 2))) for m in (y, jnp.square(y)))
        inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + 1e-6)
        scale = self.scale[...][None] * inverse
        bias = self.bias[...][None] - mean * scale
        return (y * scale[:, None, None] + bias[:, None, None]).astype(x.dtype)

    def _over_groups(self, x: jax.Array) -> jax.Array:
        """Mean over each group's channels, at every one of them: [B, channels] to the same."""
        b, c = x.shape
        means = x.reshape(b, self.groups, c // self.groups).mean(2)
        return jnp.repeat(means, c // self.groups, axis=1)


class ResBlock(nnx.Module):
    """norm, SiLU, conv, twice, added to the (projected) input."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups, rngs=rngs)
        self.conv1 = Conv(inputs, outputs, 3, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups, rngs=rngs)
        self.conv2 = Conv(outputs, outputs, 3, rngs=rngs)
        if inputs != outputs:
            self.conv_shortcut = Conv(inputs, outputs, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nnx.Module):
    """Single-head self-attention over all places of the grid."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups, rngs=rngs)
        self.to_q = Conv(channels, channels, 1, rngs=rngs)
        self.to_k = Conv(channels, channels, 1, rngs=rngs)
        self.to_v = Conv(channels, channels, 1, rngs=rngs)
        self.to_out = Conv(channels, channels, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = self.group_norm(x)
        q, k, v = (f(y).reshape(b, h * w, c) for f in (self.to_q, self.to_k, self.to_v))
        logits = jnp.einsum("bic,bjc->bij", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits / math.sqrt(c), axis=-1).astype(x.dtype)
        return x + self.to_out(jnp.einsum("bij,bjc->bic", weights, v).reshape(b, h, w, c))


class Middle(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.resnet_0 = ResBlock(channels, channels, groups, rngs=rngs)
        self.attention = Attention(channels, groups, rngs=rngs)
        self.resnet_1 = ResBlock(channels, channels, groups, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.resnet_1(self.attention(self.resnet_0(x)))


class Level(nnx.Module):
    """Residual blocks of one resolution, and the convolution that leaves it (down, up or none)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        groups: int,
        *,
        attention: bool,
        resample: bool,
        rngs: nnx.Rngs,
    ):
        self.blocks, self.attention = blocks, attention
        for i in range(blocks):
            block = ResBlock(inputs if i == 0 else outputs, outputs, groups, rngs=rngs)
            setattr(self, f"resnet_{i}", block)
            if attention:
                setattr(self, f"attention_{i}", Attention(outputs, groups, rngs=rngs))
        if resample:
            self.resample = Conv(outputs, outputs, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.blocks):
            x = getattr(self, f"resnet_{i}")(x)
            if self.attention:
                x = getattr(self, f"attention_{i}")(x)
        return x


class Encoder(nnx.Module):
    """Pictures to the mean and log-variance of the latents, before the 1 x 1 `quant_conv`."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * m for m in config.multipliers]
        self.levels = len(widths)
        self.conv_in = Conv(3, widths[0], 3, rngs=rngs)
        for i, width in enumerate(widths):
            level = Level(
                widths[max(i - 1, 0)],
                width,
                config.blocks,
                config.groups,
                attention=i in config.encoder_attention,
                resample=i < len(widths) - 1,
                rngs=rngs,
            )
            setattr(self, f"down_{i}", level)
        self.mid = Middle(widths[-1], config.groups, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], config.groups, rngs=rngs)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for i in range(self.levels):
            level = getattr(self, f"down_{i}")
            x = level(x)
            if hasattr(level, "resample"):
                # SD pads the far sides only before its strided convolution.
                x = level.resample(x, stride=2, padding=((0, 1), (0, 1)))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latents, after the 1 x 1 `post_quant_conv`, to pictures."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        widths = [config.channels * m for m in reversed(config.multipliers)]
        self.levels = len(widths)
        self.conv_in = Conv(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid = Middle(widths[0], config.groups, rngs=rngs)
        for i, width in enumerate(widths):
            level = Level(
                widths[max(i - 1, 0)],
                width,
                config.blocks + 1,
                config.groups,
                attention=len(widths) - 1 - i in config.decoder_attention,
                resample=i < len(widths) - 1,
                rngs=rngs,
            )
            setattr(self, f"up_{i}", level)
        self.conv_norm_out = GroupNorm(widths[-1], config.groups, rngs=rngs)
        self.conv_out = Conv(widths[-1], 3, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.mid(self.conv_in(x))
        for i in range(self.levels):
            level = getattr(self, f"up_{i}")
            x = level(x)
            if hasattr(level, "resample"):
                x = level.resample(x.repeat(2, axis=1).repeat(2, axis=2))
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VaeEncoder(nnx.Module):
    """The half of a `Vae` that makes tokens of pictures; its parameters are some of the whole's."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        z2 = 2 * config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = Conv(z2, z2, 1, rngs=rngs)

    def encode(
        self, images: Float[Array, "B H W 3"]
    ) -> tuple[Float[Array, "B N C"], Float[Array, "B N C"]]:
        """Mean and standard deviation of the posterior, as tokens in raster order, float32.

        The log-variance is clipped to [-30, 20] as in SD.
        """
        dtype = self.config.dtype
        encoder = sharding.gathered(self.encoder, dtype)
        moments = self.quant_conv(encoder(sharding.over_replicas(images.astype(dtype))))
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return group(mean, self.config.patch), group(std, self.config.patch)


class Vae(VaeEncoder):
    """Encoder, decoder and the grouping of latents into tokens."""

    def __init__(self, config: VaeConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        z = config.latent_channels
        self.post_quant_conv = Conv(z, z, 1, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def decode(self, tokens_BNC: Float[Array, "B N C"]) -> Float[Array, "B H W 3"]:
        """Pictures of these tokens, float32, not clipped to [-1, 1]."""
        dtype = self.config.dtype
        latents = ungroup(tokens_BNC, self.config.patch).astype(dtype)
        decoder = sharding.gathered(self.decoder, dtype)
        return decoder(self.post_quant_conv(sharding.over_replicas(latents))).astype(jnp.float32)


def group(latents: Float[Array, "B h w z"], patch: int) -> Float[Array, "B N C"]:
    """Squares of `patch` x `patch` latents as tokens.

    Inside a token: channel, then row, then column (MAR's order).
    """
    b, h, w, z = latents.shape
    x = latents.reshape(b, h // patch, patch, w // patch, patch, z)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, (h // patch) * (w // patch), z * patch**2)


def ungroup(tokens_BNC: Float[Array, "B N C"], patch: int) -> Float[Array, "B h w z"]:
    """The inverse of `group` for square grids."""
    b, n, c = tokens_BNC.shape
    side, z = math.isqrt(n), c // patch**2
    x = tokens_BNC.reshape(b, side, side, z, patch, patch)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, side * patch, side * patch, z)
