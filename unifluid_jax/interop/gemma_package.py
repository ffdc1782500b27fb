"""Gemma as the `gemma` package lays it out: its Orbax checkpoints, nested or flat.

Both spell the same names when their keys are joined by "/"; the flat ones, as which the official
checkpoints were released, begin with "transformer/" and put a "w" below the MLP's.

Projections keep the axes of heads; keys and values, gate and up are one tensor each. With as many
key heads as query heads all three projections are one. Gemma-1 and Gemma-2 2B have gate and up as
[D, F], the others as [F, D].
"""

from collections.abc import Mapping

from unifluid_jax.interop.rules import Leaf, Rule, Table

_LAYER = "layer_{layer}/"

_COMMON = (
    Rule("embedding", "embedder/input_embedding", rows=True),
    Rule("layers/pre_attention_norm/scale", _LAYER + "pre_attention_norm/scale"),
    Rule("layers/q_norm/scale", _LAYER + "attn/_query_norm/scale"),
    Rule("layers/k_norm/scale", _LAYER + "attn/_key_norm/scale"),
    Rule("layers/o", _LAYER + "attn/attn_vec_einsum/w"),
    Rule("layers/post_attention_norm/scale", _LAYER + "post_attention_norm/scale"),
    Rule("layers/pre_mlp_norm/scale", _LAYER + "pre_ffw_norm/scale"),
    Rule("layers/down", _LAYER + "mlp/linear"),
    Rule("layers/post_mlp_norm/scale", _LAYER + "post_ffw_norm/scale"),
    Rule("final_norm/scale", "final_norm/scale"),
)
_GROUPED = (
    Rule("layers/q", _LAYER + "attn/q_einsum/w", "H D K -> D H K"),
    Rule("layers/k", _LAYER + "attn/kv_einsum/w", "H D K -> D H K", at=0),
    Rule("layers/v", _LAYER + "attn/kv_einsum/w", "H D K -> D H K", at=1),
)
_FUSED = tuple(
    Rule(f"layers/{name}", _LAYER + "attn/qkv_einsum/w", "H D K -> D H K", at=i)
    for i, name in enumerate("qkv")
)
_PLAIN = tuple(
    Rule(f"layers/{name}", _LAYER + "mlp/gating_einsum", at=i)
    for i, name in enumerate(("gate", "up"))
)
_TRANSPOSED = tuple(
    Rule(f"layers/{name}", _LAYER + "mlp/gating_einsum", "F D -> D F", at=i)
    for i, name in enumerate(("gate", "up"))
)

_SPELLINGS = (
    (r"^(params/)?(transformer/)?", ""),
    (r"(/mlp/(linear|gating_einsum))/w$", r"\1"),
)
# Gemma-3's own vision tower.
_IGNORED = (
    r"vision_encoder/.*",
    r"SigLiPFromPatches_0/.*",
    r"embedder/mm_.*",
)


def _table(name: str, *parts: tuple[Rule, ...]) -> Table:
    return Table(f"gemma package, {name}", sum(parts, _COMMON), _SPELLINGS, _IGNORED)


TABLES = (
    _table("[F, D] gates", _GROUPED, _TRANSPOSED),
    _table("[D, F] gates", _GROUPED, _PLAIN),
    _table("[F, D] gates, qkv in one", _FUSED, _TRANSPOSED),
    _table("[D, F] gates, qkv in one", _FUSED, _PLAIN),
)


# Widths of Gemma-2 9B and 27B.
_TRANSPOSED_WIDTHS = (3584, 4608)


def written(leaves: Mapping[str, Leaf]) -> Table:
    """The table that the package's model of these sizes reads."""
    q, k = leaves["layers/q"].shape, leaves["layers/k"].shape
    transposed = "layers/q_norm/scale" in leaves or q[1] in _TRANSPOSED_WIDTHS
    return TABLES[2 * (q == k) + (not transposed)]
