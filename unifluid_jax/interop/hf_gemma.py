"""Gemma 1, 2 and 3 as Hugging Face's transformers store them (text part).

Linear weights are [out, in]. In Gemma-1 `post_attention_layernorm` stands before the MLP, in later
ones after the attention: one name, two of our leaves.
"""

from unifluid_jax.interop.rules import Rule, Table

_LAYER = "model.layers.{layer}."

_COMMON = (
    Rule("embedding", "model.embed_tokens.weight", rows=True),
    Rule("layers/pre_attention_norm/scale", _LAYER + "input_layernorm.weight"),
    Rule("layers/q", _LAYER + "self_attn.q_proj.weight", "(H K) D -> D H K"),
    Rule("layers/k", _LAYER + "self_attn.k_proj.weight", "(H K) D -> D H K"),
    Rule("layers/v", _LAYER + "self_attn.v_proj.weight", "(H K) D -> D H K"),
    Rule("layers/q_norm/scale", _LAYER + "self_attn.q_norm.weight"),
    Rule("layers/k_norm/scale", _LAYER + "self_attn.k_norm.weight"),
    Rule("layers/o", _LAYER + "self_attn.o_proj.weight", "D (H K) -> H K D"),
    Rule("layers/gate", _LAYER + "mlp.gate_proj.weight", "F D -> D F"),
    Rule("layers/up", _LAYER + "mlp.up_proj.weight", "F D -> D F"),
    Rule("layers/down", _LAYER + "mlp.down_proj.weight", "D F -> F D"),
    Rule("final_norm/scale", "model.norm.weight"),
)
_NORMS_1 = (Rule("layers/pre_mlp_norm/scale", _LAYER + "post_attention_layernorm.weight"),)
_NORMS_2 = (
    Rule("layers/post_attention_norm/scale", _LAYER + "post_attention_layernorm.weight"),
    Rule("layers/pre_mlp_norm/scale", _LAYER + "pre_feedforward_layernorm.weight"),
    Rule("layers/post_mlp_norm/scale", _LAYER + "post_feedforward_layernorm.weight"),
)

# Gemma-3 from 4B on wraps the text model; its vision tower is another than UniFluid's SigLIP in
# that it pools 4 x 4 features, so that its projection does not fit.
_SPELLINGS = (
    (r"^language_model\.model\.", "model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.language_model\.", "model."),
    (r"^(embed_tokens|layers|norm)\.", r"model.\1."),
)
_IGNORED = (
    r".*rotary_emb\.inv_freq",
    r"(model\.)?vision_tower\..*",
    r"(model\.)?multi_modal_projector\..*",
)
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}

GEMMA1 = Table("Hugging Face Gemma", _COMMON + _NORMS_1, _SPELLINGS, _IGNORED, _TIED)
GEMMA2 = Table("Hugging Face Gemma 2/3", _COMMON + _NORMS_2, _SPELLINGS, _IGNORED, _TIED)
TABLES = (GEMMA1, GEMMA2)
