"""The KL autoencoder of latent diffusion's own code: SD's .ckpt files, and MAR's KL-16.

Whole Stable Diffusion checkpoints keep it below "first_stage_model."; everything else in them is
none of ours. The decoder's levels are numbered from the pictures' side, ours from the latents'.
"""

from unifluid_jax.interop.diffusers_vae import CONV, LINEAR, conv, norm
from unifluid_jax.interop.rules import Rule, Table


def _block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *conv(f"{ours}/conv1", f"{theirs}.conv1"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *conv(f"{ours}/conv2", f"{theirs}.conv2"),
        *conv(f"{ours}/conv_shortcut", f"{theirs}.nin_shortcut"),
    )


def _attention(ours: str, theirs: str, form: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{ours}/group_norm", f"{theirs}.norm"),
        *conv(f"{ours}/to_q", f"{theirs}.q", form),
        *conv(f"{ours}/to_k", f"{theirs}.k", form),
        *conv(f"{ours}/to_v", f"{theirs}.v", form),
        *conv(f"{ours}/to_out", f"{theirs}.proj_out", form),
    )


def _half(half: str, ours: str, theirs: str, level: str, sampler: str, form: str):
    ours, theirs = f"{half}/{ours}_{{i}}", f"{half}.{theirs}.{{{level}}}"
    return (
        *conv(f"{half}/conv_in", f"{half}.conv_in"),
        *_block(f"{ours}/resnet_{{j}}", f"{theirs}.block.{{j}}"),
        *_attention(f"{ours}/attention_{{j}}", f"{theirs}.attn.{{j}}", form),
        *conv(f"{ours}/resample", f"{theirs}.{sampler}.conv"),
        *_block(f"{half}/mid/resnet_0", f"{half}.mid.block_1"),
        *_attention(f"{half}/mid/attention", f"{half}.mid.attn_1", form),
        *_block(f"{half}/mid/resnet_1", f"{half}.mid.block_2"),
        *norm(f"{half}/conv_norm_out", f"{half}.norm_out"),
        *conv(f"{half}/conv_out", f"{half}.conv_out"),
    )


def _table(name: str, form: str) -> Table:
    return Table(
        name,
        (
            *_half("encoder", "down", "down", "i", "downsample", form),
            *conv("quant_conv", "quant_conv"),
            *conv("post_quant_conv", "post_quant_conv"),
            *_half("decoder", "up", "up", "~i", "upsample", form),
        ),
        spellings=((r"^first_stage_model\.", ""),),
        ignored=(
            r"(model|cond_stage_model|model_ema|embedder|conditioner|control_model)\..*",
            r"loss\..*",
            r"(sqrt_|log_|posterior_|lvlb_|alphas_|betas).*",
            r"scale_factor",
            r"logvar",
        ),
    )


TABLES = (
    _table("latent diffusion autoencoder", CONV),
    _table("latent diffusion autoencoder, attention of linears", LINEAR),
)
