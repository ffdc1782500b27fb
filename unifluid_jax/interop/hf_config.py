"""The config.json that Hugging Face's transformers wants beside the weights."""

from typing import Any

import numpy as np

from unifluid_jax.errors import UserError
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.siglip import SiglipConfig

# The placeholder of pictures in PaliGemma's tokenizer: behind Gemma's pieces and 1,152 more.
_IMAGE_TOKEN = 257_152

_KINDS = {"local": "sliding_attention", "global": "full_attention"}


def gemma(config: GemmaConfig, dtype: np.dtype) -> dict[str, Any]:
    """Of a Gemma 1, 2 or 3 (text).

    Raises:
        UserError: no Gemma of theirs has these switches.
    """
    kinds = [config.attention[i % len(config.attention)] for i in range(config.depth)]
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": config.rope_base,
        "attention_bias": False,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": dtype.name,
    }
    plain = config.head_dim**-0.5
    scale = plain if config.query_scale is None else config.query_scale
    local = config.rope_base if config.local_rope_base is None else config.local_rope_base
    two_ropes = local != config.rope_base or config.rope_stretch != 1.0
    capped = config.attention_cap is not None or config.final_cap is not None

    def refuse(what: str) -> None:
        raise UserError(f"transformers has no Gemma with {what}")

    if config.post_norms != (config.post_norms or config.qk_norm):
        refuse("qk_norm and without post_norms")
    if not config.post_norms:
        if capped or "local" in kinds or two_ropes or not np.isclose(scale, plain):
            refuse(
                "soft caps, a sliding window, a RoPE base of its own for it or a query scale, and "
                "without post_norms"
            )
        return {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **fields}
    fields |= {
        "query_pre_attn_scalar": _scalar(scale),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.final_cap,
        "sliding_window": config.window,
        "layer_types": [_KINDS[kind] for kind in kinds],
    }
    if not config.qk_norm:
        if two_ropes:
            refuse("a RoPE base of its own for local layers and without qk_norm")
        return {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", **fields}
    stretch = config.rope_stretch
    fields |= {
        "max_position_embeddings": 131_072,
        "rope_local_base_freq": local,
        "rope_scaling": None if stretch == 1.0 else {"rope_type": "linear", "factor": stretch},
    }
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **fields}


def _scalar(scale: float) -> int | float:
    """x of `x ** -0.5`; a whole number where it is one."""
    value = scale**-2
    return round(value) if np.isclose(value, round(value), rtol=1e-6) else value


def siglip(config: SiglipConfig) -> dict[str, Any]:
    """Of a vision tower without its pooling head."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "vision_use_head": False,
    }


def siglip_vision(config: SiglipConfig) -> dict[str, Any]:
    """Of a vision tower that stands alone."""
    return {"architectures": ["SiglipVisionModel"], **siglip(config)}


def paligemma(text: GemmaConfig, vision: SiglipConfig, dtype: np.dtype) -> dict[str, Any]:
    """Of backbone, vision tower and projection as a PaliGemma.

    The picture's placeholder is that of PaliGemma's tokenizer, or the first id behind a vocabulary
    of another kind; transformers looks up no embedding for it.

    Raises:
        UserError: transformers has no such Gemma in a PaliGemma.
    """
    if text.qk_norm:
        raise UserError("a PaliGemma has a Gemma 1 or 2 in it: a backbone with qk_norm is none")
    inner = gemma(text, dtype)
    inner.pop("architectures")
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "image_token_index": _IMAGE_TOKEN if text.vocab_size >= 256_000 else text.vocab_size,
        "projection_dim": text.width,
        "hidden_size": text.width,
        "vocab_size": text.vocab_size,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "torch_dtype": dtype.name,
        "text_config": {**inner, "num_image_tokens": vision.tokens},
        "vision_config": {**siglip(vision), "projection_dim": text.width},
    }
