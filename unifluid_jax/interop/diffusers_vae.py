"""AutoencoderKL as diffusers stores it, before and since its attention's new names.

Convolutions are [out, in, height, width]; the middle's attention is made of linears (older files:
of 1 x 1 convolutions).
"""

from unifluid_jax.interop.rules import Rule, Table

CONV = "O I h w -> h w I O"
LINEAR = "O I -> 1 1 I O"


def conv(ours: str, theirs: str, form: str = CONV) -> tuple[Rule, ...]:
    """The two rules of a convolution."""
    return Rule(f"{ours}/kernel", f"{theirs}.weight", form), Rule(f"{ours}/bias", f"{theirs}.bias")


def norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The two rules of a GroupNorm."""
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


def _resnet(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *conv(f"{ours}/conv1", f"{theirs}.conv1"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *conv(f"{ours}/conv2", f"{theirs}.conv2"),
        *conv(f"{ours}/conv_shortcut", f"{theirs}.conv_shortcut"),
    )


def _attention(ours: str, theirs: str, form: str) -> tuple[Rule, ...]:
    return (
        *norm(f"{ours}/group_norm", f"{theirs}.group_norm"),
        *conv(f"{ours}/to_q", f"{theirs}.to_q", form),
        *conv(f"{ours}/to_k", f"{theirs}.to_k", form),
        *conv(f"{ours}/to_v", f"{theirs}.to_v", form),
        *conv(f"{ours}/to_out", f"{theirs}.to_out.0", form),
    )


def _half(half: str, ours: str, theirs: str, sampler: str, form: str) -> tuple[Rule, ...]:
    level = f"{half}.{theirs}_blocks.{{i}}"
    return (
        *conv(f"{half}/conv_in", f"{half}.conv_in"),
        *_resnet(f"{half}/{ours}_{{i}}/resnet_{{j}}", f"{level}.resnets.{{j}}"),
        *_attention(f"{half}/{ours}_{{i}}/attention_{{j}}", f"{level}.attentions.{{j}}", form),
        *conv(f"{half}/{ours}_{{i}}/resample", f"{level}.{sampler}.0.conv"),
        *_resnet(f"{half}/mid/resnet_{{j}}", f"{half}.mid_block.resnets.{{j}}"),
        *_attention(f"{half}/mid/attention", f"{half}.mid_block.attentions.0", form),
        *norm(f"{half}/conv_norm_out", f"{half}.conv_norm_out"),
        *conv(f"{half}/conv_out", f"{half}.conv_out"),
    )


def _table(name: str, form: str) -> Table:
    return Table(
        name,
        (
            *_half("encoder", "down", "down", "downsamplers", form),
            *conv("quant_conv", "quant_conv"),
            *conv("post_quant_conv", "post_quant_conv"),
            *_half("decoder", "up", "up", "upsamplers", form),
        ),
        spellings=(
            (r"^vae\.", ""),
            (r"(\.attentions\.\d+)\.query\.", r"\1.to_q."),
            (r"(\.attentions\.\d+)\.key\.", r"\1.to_k."),
            (r"(\.attentions\.\d+)\.value\.", r"\1.to_v."),
            (r"(\.attentions\.\d+)\.proj_attn\.", r"\1.to_out.0."),
        ),
    )


TABLES = (
    _table("diffusers AutoencoderKL", LINEAR),
    _table("diffusers AutoencoderKL, attention of convolutions", CONV),
)
