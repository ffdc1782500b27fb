"""The KL autoencoder of latent-diffusion and of MAR in plain PyTorch, under their parameter names.

Neither is in a package registry, so this is an independent implementation of the published
architecture, written to make golden numbers; it is nobody's reference code. The parameter names are
those of the published checkpoints.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """One head over all places."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(1, 2) / x.shape[1] ** 0.5, dim=-1)
        return x + self.proj_out((weights @ v).transpose(1, 2).reshape(x.shape))


class Conv(nn.Module):
    """A convolution inside a module of its own: the checkpoints' `downsample.conv`."""

    def __init__(self, channels, **options):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, **options)


def middle(channels, groups):
    mid = nn.Module()
    mid.block_1 = Residual(channels, channels, groups)
    mid.attn_1 = Attention(channels, groups)
    mid.block_2 = Residual(channels, channels, groups)
    return mid


def level(inputs, outputs, blocks, groups, attention):
    module = nn.Module()
    widths = [inputs] + [outputs] * blocks
    module.block = nn.ModuleList(Residual(a, outputs, groups) for a in widths[:-1])
    module.attn = nn.ModuleList(Attention(outputs, groups) for _ in range(blocks * attention))
    return module


def through(module, x):
    for i, block in enumerate(module.block):
        x = block(x)
        if len(module.attn):
            x = module.attn[i](x)
    return x


class Encoder(nn.Module):
    def __init__(self, channels, multipliers, blocks, groups, latents, attention):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False)):
            self.down.append(level(a, b, blocks, groups, i in attention))
            if i < len(widths) - 1:
                self.down[i].downsample = Conv(b, stride=2)
        self.mid = middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latents, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for stage in self.down:
            x = through(stage, x)
            if hasattr(stage, "downsample"):
                x = stage.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, channels, multipliers, blocks, groups, latents, attention):
        super().__init__()
        widths = [channels * m for m in multipliers]
        self.conv_in = nn.Conv2d(latents, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        self.up = nn.ModuleList()
        # `up.0` is the level of the pictures, though it comes last.
        for i, (a, b) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True)):
            self.up.append(level(a, b, blocks + 1, groups, i in attention))
            if i > 0:
                self.up[i].upsample = Conv(b, padding=1)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for stage in reversed(self.up):
            x = through(stage, x)
            if hasattr(stage, "upsample"):
                x = stage.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    def __init__(
        self,
        channels,
        multipliers,
        blocks,
        groups,
        latents,
        encoder_attention=(),
        decoder_attention=(),
    ):
        super().__init__()
        sizes = (channels, multipliers, blocks, groups, latents)
        self.encoder = Encoder(*sizes, encoder_attention)
        self.decoder = Decoder(*sizes, decoder_attention)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)

    def moments(self, pixels):
        """Mean and log-variance of the posterior, [B, 2 z, h, w]."""
        return self.quant_conv(self.encoder(pixels))

    def decode(self, latents):
        return self.decoder(self.post_quant_conv(latents))
