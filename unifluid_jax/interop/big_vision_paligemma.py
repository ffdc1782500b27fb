"""PaliGemma 1 and 2 as big_vision stores them: .npz, both towers' layers stacked.

`img/head` is the projection into the language model's width, not SigLIP's own head.
"""

from unifluid_jax.interop import big_vision_siglip
from unifluid_jax.interop.rules import Rule, Table

_LLM = "llm/layers/"


def _layer(ours: str, theirs: str, form: str | None = None, at: int | None = None) -> Rule:
    return Rule(f"backbone/layers/{ours}", _LLM + theirs, form, at, stacked=True)


_TEXT = (
    Rule("backbone/embedding", "llm/embedder/input_embedding", rows=True),
    _layer("pre_attention_norm/scale", "pre_attention_norm/scale"),
    _layer("q", "attn/q_einsum/w", "H D K -> D H K"),
    _layer("k", "attn/kv_einsum/w", "H D K -> D H K", at=0),
    _layer("v", "attn/kv_einsum/w", "H D K -> D H K", at=1),
    _layer("o", "attn/attn_vec_einsum/w"),
    _layer("post_attention_norm/scale", "post_attention_norm/scale"),
    _layer("pre_mlp_norm/scale", "pre_ffw_norm/scale"),
    _layer("gate", "mlp/gating_einsum", at=0),
    _layer("up", "mlp/gating_einsum", at=1),
    _layer("down", "mlp/linear"),
    _layer("post_mlp_norm/scale", "post_ffw_norm/scale"),
    Rule("backbone/final_norm/scale", "llm/final_norm/scale"),
)

TABLE = Table(
    "big_vision PaliGemma",
    (
        *_TEXT,
        *big_vision_siglip.STACKED.prefixed("vision/", "img/"),
        Rule("vision_proj/kernel", "img/head/kernel"),
        Rule("vision_proj/bias", "img/head/bias"),
    ),
    spellings=((r"^params/", ""),),
    ignored=(r"opt/.*",),
)
TABLES = (TABLE,)
