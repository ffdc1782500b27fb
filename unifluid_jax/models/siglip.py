"""SigLIP's vision transformer: a picture as M patch features, for understanding.

The architecture of big_vision's ViT as SigLIP uses it (So400m/14: width 1152, depth 27, MLP 4304,
16 heads), without the pooling
head: patches, learned positions, pre-LayerNorm blocks with biases everywhere and the tanh GELU, a
final LayerNorm.

Letters: B pictures; H W pixels; P values of a patch; M patches of a picture; W width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from unifluid_jax import sharding
from unifluid_jax.models.functional import Initializer, checkpointed, param, stack, unstack

_XAVIER = nnx.initializers.xavier_uniform()
_LECUN = nnx.initializers.lecun_normal()
_ZEROS = nnx.initializers.zeros_init()


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of a vision tower.

    Attributes:
        image_size: side of the square pictures, pixels. What `patch_size` does not divide is cut
            off at the right and the bottom (So400m/14 at 384: 27 x 27 patches). Weights of a tower
            for another size fit after `resize_positions`.
        patch_size: side of a patch, pixels.
        pool: side of the squares of patches whose features are averaged into one, as Gemma-3 does
            with its SigLIP's; 1 keeps all of them.
        scan_layers: run the blocks as one `lax.scan` (compiles once per block, whatever the depth)
            or unrolled (faster on CPU, where a scan's body runs on one core). The parameters are
            the same.
        remat: as in `GemmaConfig`, with the policies that name no value: "full" and "dots".
        dtype: compute type, also of the features.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    pool: int = 1
    scan_layers: bool = False
    remat: str | None = None
    dtype: str = "float32"

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """M, features of a picture."""
        return (self.grid // self.pool) ** 2


class Siglip(nnx.Module):
    """The vision tower.

    The patch embedding is a linear on flattened patches, rows, columns, channels in this order. A
    convolution kernel `[out, in, ph, pw]` (PyTorch) becomes its kernel by `transpose(2, 3, 1,
    0).reshape(-1, out)`, `[ph, pw, in, out]` (big_vision) by the reshape alone.
    """

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        if config.width % config.heads:
            raise ValueError(f"width {config.width} is not divisible by heads {config.heads}")
        if config.grid % config.pool:
            raise ValueError(f"pool {config.pool} does not divide {config.grid} patches a side")
        dtype = jnp.dtype(config.dtype)
        self.config = config
        axes = (None, "vision_embed")
        values = 3 * config.patch_size**2
        self.patch_in = _linear(values, config.width, axes, _LECUN, _ZEROS, dtype, rngs)
        self.positions = param(
            nnx.initializers.normal(config.width**-0.5),
            rngs.params(),
            (config.grid**2, config.width),
            axes,
        )
        self.blocks = stack(lambda r: Block(config, rngs=r), config.depth, rngs)
        self.final_norm = norm(config.width, dtype, rngs)

    def __call__(self, images_BHWC: Float[Array, "B H W 3"]) -> Float[Array, "B M D"]:
        """Patch features, or their means over squares of patches, in raster order.

        Args:
            images_BHWC: pictures of `image_size`, values in [-1, 1].

        Raises:
            ValueError: the pictures have another size.
        """
        config = self.config
        given, wanted = images_BHWC.shape[1:3], (config.image_size, config.image_size)
        if given != wanted:
            raise ValueError(f"pictures of {given} pixels for a tower of {wanted}: resize them")
        patch_in = sharding.gathered(self.patch_in, config.dtype)
        x_BMW = patch_in(_patches(images_BHWC, config.patch_size, config.grid))
        x_BMW += self.positions[...].astype(x_BMW.dtype)[None]

        def run(block: Block, x: jax.Array) -> jax.Array:
            return sharding.over_replicas(sharding.gathered(block, config.dtype)(x))

        run = checkpointed(run, config.remat, "config.model.vision.remat")
        if config.scan_layers:
            x_BMW, _ = jax.lax.scan(lambda x, block: (run(block, x), None), x_BMW, self.blocks)
        else:
            for block in unstack(self.blocks, config.depth):
                x_BMW = run(block, x_BMW)
        return _pooled(self.final_norm(x_BMW), config.pool)


class Block(nnx.Module):
    """A pre-LayerNorm transformer block: attention of all patches to all, then the MLP."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        width, dtype = config.width, jnp.dtype(config.dtype)
        head = (config.heads, width // config.heads)
        self.attention_norm = norm(width, dtype, rngs)
        axes = ("vision_embed", "vision_heads", "head_dim")
        self.query = _projection(width, head, -1, axes, dtype, rngs)
        self.key = _projection(width, head, -1, axes, dtype, rngs)
        self.value = _projection(width, head, -1, axes, dtype, rngs)
        axes = ("vision_heads", "head_dim", "vision_embed")
        self.attention_out = _projection(head, width, (-2, -1), axes, dtype, rngs)
        self.mlp_norm = norm(width, dtype, rngs)
        tiny = nnx.initializers.normal(1e-6)
        axes = ("vision_embed", "vision_mlp")
        self.mlp_in = _linear(width, config.mlp_dim, axes, _XAVIER, tiny, dtype, rngs)
        self.mlp_out = _linear(config.mlp_dim, width, axes[::-1], _XAVIER, tiny, dtype, rngs)

    def __call__(self, x_BMW: Float[Array, "B M W"]) -> Float[Array, "B M W"]:
        h = self.attention_norm(x_BMW)
        h = jax.nn.dot_product_attention(self.query(h), self.key(h), self.value(h))
        x_BMW = x_BMW + self.attention_out(h)
        h = self.mlp_in(self.mlp_norm(x_BMW))
        return x_BMW + self.mlp_out(jax.nn.gelu(h, approximate=True))


def _pooled(x_BPW: Float[Array, "B P W"], size: int) -> Float[Array, "B M W"]:
    """Means over squares of `size` x `size` of a square grid of features."""
    b, count, width = x_BPW.shape
    side = math.isqrt(count) // size
    x = x_BPW.reshape(b, side, size, side, size, width)
    return x.mean(axis=(2, 4)).reshape(b, side * side, width)


def resize_positions(positions_MW: Float[np.ndarray, "M W"], grid: int) -> np.ndarray:
    """Position embeddings of a square grid of patches for one of `grid` x `grid`, float32.

    Bicubic (a = -0.75, borders repeated, pixel centres aligned, no antialiasing), which is what
    Hugging Face's SigLIP does; big_vision interpolates linearly between the corners instead.
    """
    side = math.isqrt(len(positions_MW))
    if side**2 != len(positions_MW):
        raise ValueError(f"{len(positions_MW)} positions are no square grid")
    if side == grid:
        return np.asarray(positions_MW, np.float32)
    matrix = _bicubic(side, grid)
    table = np.asarray(positions_MW, np.float64).reshape(side, side, -1)
    resized = np.einsum("ai,bj,ijw->abw", matrix, matrix, table, optimize=True)
    return resized.reshape(grid * grid, -1).astype(np.float32)


def _bicubic(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """The matrix of a bicubic interpolation (Keys' kernel) of `old` samples at `new` places."""

    def kernel(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
        d = np.abs(distance)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        return np.where(d <= 1, near, np.where(d < 2, far, 0.0))

    place = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(place)[:, None] + np.arange(-1, 3)[None]
    matrix = np.zeros((new, old))
    rows = np.broadcast_to(np.arange(new)[:, None], taps.shape)
    columns = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(matrix, (rows, columns), kernel(place[:, None] - taps))
    return matrix


def _patches(images_BHWC: Float[Array, "B H W 3"], size: int, grid: int) -> Float[Array, "B M P"]:
    """Non-overlapping patches in raster order, each flattened as rows, columns, channels."""
    batch, side = images_BHWC.shape[0], size * grid
    x = images_BHWC[:, :side, :side].reshape(batch, grid, size, grid, size, 3)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, grid * grid, size * size * 3)


def _linear(
    inputs: int,
    outputs: int,
    axes: tuple[str | None, ...],
    kernel_init: Initializer,
    bias_init: Initializer,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dtype=dtype,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": axes[1:]},
        rngs=rngs,
    )


def _projection(
    inputs: int | tuple[int, int],
    outputs: int | tuple[int, int],
    axis: int | tuple[int, int],
    axes: tuple[str, str, str],
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.LinearGeneral:
    """A linear into or out of the heads; initialised as the matrix it is."""
    bias_axes = axes[1:] if isinstance(outputs, tuple) else axes[2:]
    return nnx.LinearGeneral(
        inputs,
        outputs,
        axis=axis,
        kernel_init=_XAVIER,
        dtype=dtype,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": bias_axes},
        rngs=rngs,
    )


def norm(width: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """The LayerNorm of both towers of a SigLIP."""
    return nnx.LayerNorm(
        width,
        epsilon=1e-6,
        use_fast_variance=False,  # as the reference; E[x^2] - E[x]^2 cancels where |mean| >> std
        dtype=dtype,
        scale_metadata={"axes": ("vision_embed",)},
        bias_metadata={"axes": ("vision_embed",)},
        rngs=rngs,
    )
