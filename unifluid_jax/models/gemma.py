"""Gemma decoder: the backbone that reads text and image embeddings in one sequence.

Gemma-2 is UniFluid's main one; by their configs the same blocks are Gemma-1 and the text part of
Gemma-3 (`presets.py` has the published sizes).

Letters: B rows, T positions fed, S positions attended to (T, or the slots of the cache), D width,
H query heads, G key/value heads, Q = H / G query heads per key/value head, K head dim, F MLP width,
V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from unifluid_jax import sharding
from unifluid_jax.models import kernels
from unifluid_jax.models.functional import checkpointed, param, stack, unstack
from unifluid_jax.models.kernels import Packed

Cache = dict[str, Any]
# Attention of given queries, keys and values under one mask: (q_BTHK, k_BSGK, v_BSGK) -> BTHK.
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_dense = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_zeros = jax.nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes and switches of the decoder.

    Attributes:
        attention: kinds of attention, "local" (sliding window) or "global", repeated over the
            depth.
        window: positions a local layer sees, itself included.
        query_scale: factor on queries; None is `head_dim ** -0.5`.
        qk_norm: RMSNorm of every query and key head before RoPE (Gemma-3).
        attention_cap, final_cap: soft caps of attention and vocabulary logits; None is no cap
            (Gemma-1 and Gemma-3).
        post_norms: RMSNorm after attention and MLP too (Gemma-2 and Gemma-3).
        post_norm_init: what a fresh one of these multiplies by. Below 1, fresh layers leave the
            residual stream mostly as it is: for models that start from nothing (our choice).
        rope_base: longest wavelength of RoPE in global layers, over 2 pi.
        local_rope_base: the same in local layers; None is `rope_base`.
        rope_stretch: positions of global layers are divided by it (Gemma-3's linear RoPE scaling).
        scan_layers: run the layers by `lax.scan` (accelerators: one layer is compiled) or unrolled
            (CPU: a scan body runs on one core).
        remat: what a layer keeps for the backward pass, a name of `functional.REMAT`, or None for
            every activation.
        kernel: what computes attention without a cache: "einsum", "splash" (TPU), "cudnn" (GPU,
            without a soft cap), or "auto", the best of them for the devices in use.
        dtype: compute type; parameters are float32.
    """

    vocab_size: int
    width: int
    depth: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    attention: tuple[str, ...] = ("local", "global")
    window: int = 4096
    query_scale: float | None = None
    qk_norm: bool = False
    attention_cap: float | None = 50.0
    final_cap: float | None = 30.0
    post_norms: bool = True
    post_norm_init: float = 1.0
    rope_base: float = 10_000.0
    local_rope_base: float | None = None
    rope_stretch: float = 1.0
    scan_layers: bool = True
    remat: str | None = None
    kernel: str = "auto"
    dtype: str = "float32"

    def rope_of(self, kind: str) -> tuple[float, float]:
        """Base and stretch of RoPE in layers of this kind of attention."""
        if kind == "global":
            return self.rope_base, self.rope_stretch
        return self.rope_base if self.local_rope_base is None else self.local_rope_base, 1.0


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """`cap * tanh(x / cap)`, or `x` when there is no cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope(
    x_BTHK: Float[Array, "B T H K"],
    position_BT: Int[Array, "B T"],
    base: float,
    stretch: float = 1.0,
) -> Float[Array, "B T H K"]:
    """Rotary position embedding, angles in float32.

    Halves are rotated against each other (Gemma's convention). Positions are divided by `stretch`.
    """
    half = x_BTHK.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half) / stretch
    angle = position_BT[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    x1, x2 = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)


def attend(
    q_BTHK: Float[Array, "B T H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGK: Float[Array, "B S G K"],
    mask_BTS: Bool[Array, "B T S"],
    cap: float | None,
) -> Float[Array, "B T H K"]:
    """Grouped-query attention, softmax in float32. The queries come scaled.

    A position that may attend to nothing (padding) gets the mean of all values, which nobody reads.
    """
    b, t, h, k = q_BTHK.shape
    groups = k_BSGK.shape[2]
    # The Q = H / G heads and T queries of a group are the rows of one matmul: as two axes, with few
    # queries, XLA on CPU takes three times as long.
    q_BGQTK = jnp.moveaxis(q_BTHK.reshape(b, t, groups, h // groups, k), 1, 3)
    q_BGRK = q_BGQTK.reshape(b, groups, -1, k)
    logits_BGRS = jnp.einsum("BGRK,BSGK->BGRS", q_BGRK, k_BSGK, preferred_element_type=jnp.float32)
    logits_BGQTS = soft_cap(logits_BGRS, cap).reshape(*q_BGQTK.shape[:4], -1)
    logits_BGQTS = jnp.where(mask_BTS[:, None, None], logits_BGQTS, -2.0e38)
    weights_BGQTS = jax.nn.softmax(logits_BGQTS, axis=-1).astype(v_BSGK.dtype)
    weights_BGRS = weights_BGQTS.reshape(logits_BGRS.shape)
    y_BGRK = jnp.einsum("BGRS,BSGK->BGRK", weights_BGRS, v_BSGK)
    y_BTHK = jnp.moveaxis(y_BGRK.reshape(q_BGQTK.shape), 3, 1).reshape(b, t, h, k)
    return checkpoint_name(y_BTHK, "attention")


class RmsNorm(nnx.Module):
    """RMSNorm with Gemma's `1 + scale`, eps 1e-6, in float32."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, factor: float = 1.0, axis: str = "embed"):
        init = jax.nn.initializers.constant(factor - 1.0)
        self.scale = param(init, rngs.params(), (width,), (axis,))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
        scale = 1.0 + self.scale[...]
        return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Block(nnx.Module):
    """Attention and GeGLU MLP, each with a norm before and, since Gemma-2, one after."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.config = c = config
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")

        def dense(in_axis, out_axis):
            return jax.nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis
            )

        project = dense(0, (1, 2))
        self.pre_attention_norm = RmsNorm(c.width, rngs=rngs)
        self.q = param(project, rngs.params(), (c.width, c.heads, c.head_dim), q_axes)
        self.k = param(project, rngs.params(), (c.width, c.kv_heads, c.head_dim), kv_axes)
        self.v = param(project, rngs.params(), (c.width, c.kv_heads, c.head_dim), kv_axes)
        self.o = param(
            dense((0, 1), 2),
            rngs.params(),
            (c.heads, c.head_dim, c.width),
            ("heads", "head_dim_in", "embed_out"),
        )
        if c.qk_norm:
            self.q_norm = RmsNorm(c.head_dim, axis="head_dim", rngs=rngs)
            self.k_norm = RmsNorm(c.head_dim, axis="head_dim", rngs=rngs)
        self.pre_mlp_norm = RmsNorm(c.width, rngs=rngs)
        self.gate = param(_dense, rngs.params(), (c.width, c.mlp_dim), ("embed", "mlp"))
        self.up = param(_dense, rngs.params(), (c.width, c.mlp_dim), ("embed", "mlp"))
        self.down = param(_dense, rngs.params(), (c.mlp_dim, c.width), ("mlp_in", "embed_out"))
        if c.post_norms:
            self.post_attention_norm = RmsNorm(c.width, factor=c.post_norm_init, rngs=rngs)
            self.post_mlp_norm = RmsNorm(c.width, factor=c.post_norm_init, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        kind: str,
        position_BT: jax.Array,
        attend: Attend,
        cache: Cache | None,
        offset: jax.Array | int,
    ) -> tuple[jax.Array, Cache | None]:
        attended, cache = self._attention(
            self.pre_attention_norm(x_BTD), kind, position_BT, attend, cache, offset
        )
        x_BTD += self.post_attention_norm(attended) if self.config.post_norms else attended
        fed = self._mlp(self.pre_mlp_norm(x_BTD))
        return x_BTD + (self.post_mlp_norm(fed) if self.config.post_norms else fed), cache

    def _attention(self, x_BTD, kind, position_BT, attend, cache, offset):
        c, dtype = self.config, x_BTD.dtype
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
        q = jnp.einsum("BTD,DHK->BTHK", x_BTD, self.q[...].astype(dtype))
        k = jnp.einsum("BTD,DGK->BTGK", x_BTD, self.k[...].astype(dtype))
        v = jnp.einsum("BTD,DGK->BTGK", x_BTD, self.v[...].astype(dtype))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rope(q, position_BT, *c.rope_of(kind)) * scale
        k = rope(k, position_BT, *c.rope_of(kind))
        if cache is not None:
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(
                    cache[name], new.swapaxes(1, 2), offset, axis=2
                )
                for name, new in (("k", k), ("v", v))
            }
            k, v = cache["k"].swapaxes(1, 2), cache["v"].swapaxes(1, 2)
        q, k, v = (checkpoint_name(x, "qkv") for x in (q, k, v))
        y = attend(q, k, v)
        return jnp.einsum("BTHK,HKD->BTD", y, self.o[...].astype(dtype)), cache

    def _mlp(self, x_BTD):
        dtype = x_BTD.dtype
        gate = checkpoint_name(x_BTD @ self.gate[...].astype(dtype), "gate")
        up = checkpoint_name(x_BTD @ self.up[...].astype(dtype), "up")
        gate, up = _gradient_once(gate), _gradient_once(up)
        return (jax.nn.gelu(gate, approximate=True) * up) @ self.down[...].astype(dtype)


@jax.custom_vjp
def _gradient_once(x: jax.Array) -> jax.Array:
    """`x`, whose gradient is computed once and not in every matmul of the backward pass.

    XLA on CPU would fuse GeLU's derivative into the transposition before a matmul, and run it
    element by element: a tenth of a small model's step.
    """
    return x


_gradient_once.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),))


def _look_up(
    table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """Rows of the table of embeddings.

    Where the vocabulary is cut, every device looks up the tokens of all whose part it may hold, and
    gets its own rows back: ids and rows travel, never the table.
    """
    mesh = sharding.vocabulary_mesh(len(table_VD), rows=len(tokens_BT))
    if mesh is None:
        return table_VD.astype(dtype)[tokens_BT]

    def local(part_VD, tokens_BT):
        tokens_BT = jax.lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
        tokens_BT -= jax.lax.axis_index(sharding.VOCABULARY) * len(part_VD)
        here_BT = (tokens_BT >= 0) & (tokens_BT < len(part_VD))
        rows_BTD = part_VD[jnp.where(here_BT, tokens_BT, 0)]
        # One device has a row, so that the sums below are exact in the compute type.
        rows_BTD = jnp.where(here_BT[:, :, None], rows_BTD, 0.0).astype(dtype)
        rows_BTD = jax.lax.psum_scatter(rows_BTD, "fsdp", scatter_dimension=0, tiled=True)
        return jax.lax.psum(rows_BTD, "tensor")

    rows = jax.P(sharding.REPLICAS)
    return jax.shard_map(local, in_specs=(jax.P(sharding.VOCABULARY), rows), out_specs=rows)(
        table_VD, tokens_BT
    )


class Gemma(nnx.Module):
    """Embedding table (tied to the output), blocks, final norm."""

    def __init__(self, config: GemmaConfig, *, rngs: nnx.Rngs):
        self.config = config
        # Rows of norm about 1: scaled by sqrt(D) on the way in they have unit variance, and so have
        # the first logits.
        self.embedding = param(
            jax.nn.initializers.normal(config.width**-0.5),
            rngs.params(),
            (config.vocab_size, config.width),
            ("vocab", "embed_out"),
        )
        self.layers = stack(lambda r: Block(config, rngs=r), config.depth, rngs)
        self.final_norm = RmsNorm(config.width, rngs=rngs)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of text tokens, scaled by sqrt(D) as in every Gemma."""
        rows = _look_up(self.embedding[...], tokens_BT, self.config.dtype)
        return rows * jnp.asarray(math.sqrt(self.config.width), rows.dtype)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Vocabulary logits of final hidden states, float32, soft-capped."""
        logits = jnp.einsum(
            "...D,VD->...V",
            hidden,
            self.embedding[...].astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        return soft_cap(logits, self.config.final_cap)

    def init_cache(self, batch: int, slots: int) -> Cache:
        """An empty key/value cache.

        Keys and values [B, G, slots, K] of every layer, stacked as [layers, ...] where layers are
        scanned; and the RoPE position held by every slot. Layers that are not scanned keep theirs
        apart, so that a loop writes to them in place; heads come before slots, so that attention
        reads them as they lie.
        """
        c = self.config

        def empty(*layers: int) -> dict[str, jax.Array]:
            shape = (*layers, batch, c.kv_heads, slots, c.head_dim)
            return {"k": jnp.zeros(shape, c.dtype), "v": jnp.zeros(shape, c.dtype)}

        return {
            "layers": empty(c.depth) if c.scan_layers else [empty() for _ in range(c.depth)],
            "position": jnp.zeros((batch, slots), jnp.int32),
        }

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        position_BT: Int[Array, "B T"],
        mask: Bool[Array, "B T S"] | Packed,
        cache: Cache | None = None,
        offset: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states of the T positions fed.

        Args:
            x_BTD: embeddings, in the compute type.
            position_BT: RoPE positions.
            mask: who attends to whom. A full pass takes the vectors of packed rows, which every
                kernel can read, or the mask they make; with a cache S is the cache's slots, each of
                which must have been written by this call or an earlier one where the mask is true.
            cache: from `init_cache`, or None for a full pass.
            offset: slot that the first of the T positions is written to, the same for every row.
        """
        key_position = position_BT
        if cache is not None:
            key_position = jax.lax.dynamic_update_slice_in_dim(
                cache["position"], position_BT, offset, axis=1
            )
        attend = self._attend(position_BT, key_position, mask)

        def run(block: Block, kind: str, x: jax.Array, layer_cache: Cache | None):
            block = sharding.gathered(block, self.config.dtype)
            x, layer_cache = block(x, kind, position_BT, attend[kind], layer_cache, offset)
            return sharding.over_replicas(x), layer_cache

        kept = None if cache is None else cache["layers"]
        x_BTD, kept = _run_layers(self.config, self.layers, run, x_BTD, kept)
        if cache is not None:
            cache = {"layers": kept, "position": key_position}
        return self.final_norm(x_BTD), cache

    def _attend(
        self, position_BT: jax.Array, key_position_BS: jax.Array, mask: jax.Array | Packed
    ) -> dict[str, Attend]:
        """Attention of local and of global layers."""
        c = self.config
        if isinstance(mask, Packed):
            kernel = kernels.choose(c.kernel, position_BT.shape[1], c.head_dim, c.attention_cap)
            if kernel == "splash":
                splash = functools.partial(kernels.splash, packed=mask, cap=c.attention_cap)
                return {
                    "global": functools.partial(splash, window=None),
                    "local": functools.partial(splash, window=c.window),
                }
            mask = mask.mask()
        else:
            kernel = "einsum"
        distance = position_BT[:, :, None] - key_position_BS[:, None, :]
        masks = {"global": mask, "local": mask & (distance < c.window)}
        if kernel == "cudnn":
            return {kind: functools.partial(kernels.cudnn, mask_BTT=m) for kind, m in masks.items()}
        return {
            kind: functools.partial(attend, mask_BTS=m, cap=c.attention_cap)
            for kind, m in masks.items()
        }


def _run_layers(
    config: GemmaConfig,
    layers: Any,
    run: Callable[[Block, str, jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    cache: Any,
) -> tuple[jax.Array, Any]:
    """All blocks in turn, scanned over whole periods of the attention pattern or unrolled.

    A period is unrolled inside the scan so that "local" and "global" stay static there; layers left
    over after the last whole period follow the scan.

    Args:
        layers: stacked, or where they are not scanned a list.
        cache: keys and values of the layers, see `Gemma.init_cache`.
    """
    run = checkpointed(run, config.remat, "config.model.backbone.remat", static_argnums=(1,))
    period = len(config.attention)

    def unrolled(x, blocks, caches):
        new = []
        for i, (block, layer_cache) in enumerate(zip(blocks, caches, strict=True)):
            x, layer_cache = run(block, config.attention[i % period], x, layer_cache)
            new.append(layer_cache)
        return x, None if cache is None else new

    if not config.scan_layers:
        caches = [None] * config.depth if cache is None else cache
        return unrolled(x, unstack(layers, config.depth), caches)

    def unrolled_group(x, group, depth):
        x, new = unrolled(x, *zip(*unstack(group, depth), strict=True))
        return x, None if new is None else jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)

    stacked = (layers, cache)
    whole = config.depth - config.depth % period
    groups = jax.tree.map(
        lambda leaf: leaf[:whole].reshape(whole // period, period, *leaf.shape[1:]), stacked
    )
    x, new = jax.lax.scan(lambda x, group: unrolled_group(x, group, period), x, groups)
    new = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), new)
    if whole < config.depth:
        rest = jax.tree.map(lambda leaf: leaf[whole:], stacked)
        x, tail = unrolled_group(x, rest, config.depth - whole)
        new = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, tail)
    return x, new
