"""Published sizes of the parts, by name: Gemma 1 to 3, SigLIP, Stable Diffusion's autoencoder.

A config writes `config.model.backbone = ConfigDict(preset("gemma2_2b", dtype="bfloat16"))`: a saved
config holds every size and depends on no table, and every one of them is a flag. What a preset does
not name keeps the default of the part's dataclass.
"""

from typing import Any

from unifluid_jax.errors import UserError, nearest

# Vocabularies are the tokenizer's and so are in no preset: 256,000 pieces (256,128 rows in the
# official files) for Gemma 1 and 2, 262,144 for Gemma 3.
_GEMMA1 = {
    "attention": ("global",),
    "attention_cap": None,
    "final_cap": None,
    "post_norms": False,
    "head_dim": 256,
}
_GEMMA2 = {"attention": ("local", "global"), "window": 4096}
_GEMMA3 = {
    "attention": ("local",) * 5 + ("global",),
    "attention_cap": None,
    "final_cap": None,
    "qk_norm": True,
    "rope_base": 1_000_000.0,
    "local_rope_base": 10_000.0,
    "head_dim": 256,
}
_SO400M_14 = {"patch_size": 14, "width": 1152, "depth": 27, "heads": 16, "mlp_dim": 4304}
_B_16 = {"patch_size": 16, "width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}


def _sizes(width: int, depth: int, mlp_dim: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "heads": heads,
        "kv_heads": kv_heads,
    }


# Fields of GemmaConfig.
GEMMA: dict[str, dict[str, Any]] = {
    "gemma1_2b": _GEMMA1 | _sizes(2048, 18, 16384, 8, 1),
    "gemma2_2b": _GEMMA2 | {"head_dim": 256} | _sizes(2304, 26, 9216, 8, 4),
    "gemma2_9b": _GEMMA2 | {"head_dim": 256} | _sizes(3584, 42, 14336, 16, 8),
    # The one Gemma whose queries are not scaled by head_dim^-0.5, but by (width / heads)^-0.5.
    "gemma2_27b": _GEMMA2
    | {"head_dim": 128, "query_scale": (4608 / 32) ** -0.5}
    | _sizes(4608, 46, 36864, 32, 16),
    "gemma3_270m": _GEMMA3 | {"window": 512} | _sizes(640, 18, 2048, 4, 1),
    "gemma3_1b": _GEMMA3 | {"window": 512} | _sizes(1152, 26, 6912, 4, 1),
    "gemma3_4b": _GEMMA3 | {"window": 1024, "rope_stretch": 8.0} | _sizes(2560, 34, 10240, 8, 4),
}

# Fields of SiglipConfig.
SIGLIP: dict[str, dict[str, Any]] = {
    "siglip_so400m_14_224": _SO400M_14 | {"image_size": 224},
    "siglip_so400m_14_384": _SO400M_14 | {"image_size": 384},
    "siglip_b_16_224": _B_16 | {"image_size": 224},
    "siglip_b_16_256": _B_16 | {"image_size": 256},
}

# Fields of VaeConfig.
VAE: dict[str, dict[str, Any]] = {
    "sd_vae": {
        "channels": 128,
        "multipliers": (1, 2, 4, 4),
        "latent_channels": 4,
        "patch": 2,
    },
    "mar_kl16": {
        "channels": 128,
        "multipliers": (1, 1, 2, 2, 4),
        "encoder_attention": (4,),
        "latent_channels": 16,
        "patch": 1,
    },
}

# What the latents are multiplied with where one scalar normalises them (MAR, Stable Diffusion).
LATENT_SCALE = {"sd_vae": 0.18215, "mar_kl16": 0.2325}


def preset(name: str, **overrides: Any) -> dict[str, Any]:
    """Fields of the part called `name`, with these changed or added.

    Raises:
        UserError: no preset has this name.
    """
    known = GEMMA | SIGLIP | VAE
    if name not in known:
        raise UserError(f'no preset called "{name}"{nearest(name, known)}')
    return {**known[name], **overrides}
