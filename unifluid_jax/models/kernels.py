"""Attention by the kernels of the chips: splash (Pallas) on TPUs, cuDNN's on NVIDIA GPUs.

The slow twin of both is `gemma.attend`, an einsum over the whole mask, which runs everywhere.

Letters: as in `gemma.py`; here S = T.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as pallas
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from unifluid_jax import sharding
from unifluid_jax.errors import UserError
from unifluid_jax.sequence import attention_mask

KERNELS = ("auto", "einsum", "splash", "cudnn")

# What a query sees fits into one number: its last position above, its own below these bits.
_BITS = 15


class Packed(NamedTuple):
    """Who attends to whom in packed rows, as the vectors that `sequence.attention_mask` reads.

    Attributes:
        step: 1 where a new causal step starts.
        segment: the example a position belongs to, 0 for padding.
    """

    step: Int[Array, "B T"]
    segment: Int[Array, "B T"]

    def mask(self) -> Bool[Array, "B T T"]:
        return attention_mask(self.step, self.segment)


def choose(kernel: str, length: int, head_dim: int, cap: float | None) -> str:
    """The kernel that "auto" stands for where the step will run; another name as it is.

    Splash needs multiples of 128 positions and head dims; cuDNN knows no soft cap.

    Raises:
        UserError: there is no such kernel, or it cannot do what was asked for.
    """
    if kernel not in KERNELS:
        raise UserError(
            f'config.model.backbone.kernel is "{kernel}": one of {", ".join(KERNELS)} is known'
        )
    splash = length % 128 == 0 and head_dim % 128 == 0 and length <= 1 << _BITS
    if kernel == "auto":
        best = {"tpu": "splash" if splash else "einsum", "gpu": "einsum" if cap else "cudnn"}
        return best.get(sharding.platform(), "einsum")
    if kernel == "splash" and not (length % 128 == 0 and length <= 1 << _BITS):
        raise UserError(
            f"splash attention needs a multiple of 128 positions, at most {1 << _BITS}: "
            f"config.input.seq_len is {length}"
        )
    if kernel == "cudnn" and cap is not None:
        raise UserError(
            f"cuDNN's attention has no soft cap, config.model.backbone.attention_cap is {cap}: "
            "set config.model.backbone.kernel to einsum"
        )
    return kernel


def splash(
    q_BTHK: Float[Array, "B T H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    packed: Packed,
    window: int | None,
    cap: float | None,
) -> Float[Array, "B T H K"]:
    """Grouped-query attention without the T x T logits in memory. The queries come scaled.

    Where the mask is causal by steps, a position sees all positions up to the last one of its own
    step: one number for each query, from which the kernel computes its mask. Pads see each other,
    which nobody reads. Interpreted on a CPU.

    Args:
        window: positions a local layer sees, None for a global one. Positions of an example are
            consecutive, so their distance is that of their places in the row.
    """
    length = q_BTHK.shape[1]
    causal_BT = jnp.cumsum(packed.step, axis=1)
    sees_BTT = causal_BT[:, None, :] <= causal_BT[:, :, None]
    last_BT = sees_BTT.sum(axis=2, dtype=jnp.int32) - 1
    code_BT = (last_BT << _BITS) + jnp.arange(length)[None]
    if window is not None and window >= length:
        window = None

    def rows(q, k, v, code, segment):
        one = functools.partial(_splash_row, window=window, cap=cap, interpret=interpret)
        return jax.vmap(one)(q, k, v, code, segment)

    interpret = sharding.platform() == "cpu"
    mesh = sharding.context()
    heads_first = [x.swapaxes(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK)]
    if mesh is not None:
        cuts = mesh.shape["tensor"]
        heads_first[1:] = [_at_least(cuts, x) for x in heads_first[1:]]
        # A Pallas kernel is opaque to the partitioner: it has to be told.
        cut = jax.P(sharding.REPLICAS, "tensor")
        row = jax.P(sharding.REPLICAS)
        rows = jax.shard_map(
            rows, in_specs=(cut, cut, cut, row, row), out_specs=cut, check_vma=False
        )
    return rows(*heads_first, code_BT, packed.segment).swapaxes(1, 2)


def _at_least(cuts: int, x_BGTK: jax.Array) -> jax.Array:
    """Key heads repeated until every device of a tensor group has those of its queries."""
    heads = x_BGTK.shape[1]
    if heads % cuts == 0:
        return x_BGTK
    if cuts % heads:
        raise UserError(
            f"config.mesh.tensor = {cuts} and config.model.backbone.kv_heads = {heads}: one must "
            "divide the other"
        )
    return jnp.repeat(x_BGTK, cuts // heads, axis=1)


def _splash_row(q_HTK, k_GTK, v_GTK, code_T, segment_T, *, window, cap, interpret):
    length = code_T.shape[0]
    block = next(size for size in (512, 256, 128) if length % size == 0)
    info = MaskInfo(None, None, None, None, q_sequence=code_T)
    kernel = pallas.SplashAttentionKernel(
        info,
        None,
        info,
        block_sizes=pallas.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=pallas.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name="attention",  # the kernel's own backward pass needs them
        mask_function=_visible(window),
        interpret=interpret,
    )
    segments = pallas.SegmentIds(segment_T, segment_T)
    return kernel(q_HTK, k_GTK, v_GTK, segment_ids=segments)


@functools.cache
def _visible(window: int | None):
    """The mask of a block from the codes of its queries; cached, since kernels are by it."""

    def visible(code: jax.Array, key: jax.Array) -> jax.Array:
        seen = key <= (code >> _BITS)
        if window is not None:
            seen &= key > (code & ((1 << _BITS) - 1)) - window
        return seen

    return visible


def cudnn(
    q_BTHK: Float[Array, "B T H K"],
    k_BTGK: Float[Array, "B T G K"],
    v_BTGK: Float[Array, "B T G K"],
    mask_BTT: Bool[Array, "B T T"],
) -> Float[Array, "B T H K"]:
    """Grouped-query attention by cuDNN, on NVIDIA GPUs in 16 bits. The queries come scaled."""
    y_BTHK = jax.nn.dot_product_attention(
        q_BTHK, k_BTGK, v_BTGK, mask=mask_BTT[:, None], scale=1.0, implementation="cudnn"
    )
    return checkpoint_name(y_BTHK, "attention")
