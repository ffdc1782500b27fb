"""MAR's diffusion head and process in plain PyTorch, under MAR's parameter names.

MAR's code is in no package registry, so this is an independent implementation of the published
method (arXiv 2406.11838; the process is that of improved diffusion, arXiv 2102.09672), written to
make golden numbers; it is nobody's reference code.
"""

import math

import numpy as np
import torch
from torch import nn

STEPS = 1000


def modulated(x, shift, scale):
    return x * (1 + scale) + shift


class Time(nn.Module):
    def __init__(self, width, dim=256):
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        half = self.dim // 2
        frequency = torch.exp(-math.log(10_000) * torch.arange(half) / half)
        phase = t[:, None].float() * frequency
        return self.mlp(torch.cat([phase.cos(), phase.sin()], dim=-1))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulated(self.in_ln(x), shift, scale))


class Final(nn.Module):
    def __init__(self, width, outputs):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(modulated(self.norm_final(x), shift, scale))


class Head(nn.Module):
    """Noise and variance logits, [N, 2 C], of noisy tokens x, steps t and conditions z."""

    def __init__(self, dim, condition, width, depth):
        super().__init__()
        self.time_embed = Time(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(dim, width)
        self.res_blocks = nn.ModuleList(Residual(width) for _ in range(depth))
        self.final_layer = Final(width, 2 * dim)

    def forward(self, x, t, z):
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(z)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)


class Chain:
    """The cosine chain, or its restriction to `kept` steps; constants in float64."""

    def __init__(self, kept=None):
        bar = [math.cos((i / STEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(STEPS + 1)]
        betas = np.array([min(1 - bar[i + 1] / bar[i], 0.999) for i in range(STEPS)])
        self.kept = list(range(STEPS)) if kept is None else kept
        self.a = np.cumprod(1 - betas)[self.kept]
        self.before = np.concatenate([[1.0], self.a[:-1]])
        self.beta = 1 - self.a / self.before
        variance = self.beta * (1 - self.before) / (1 - self.a)
        variance[0] = variance[1]  # it is 0, and its logarithm is wanted
        self.log_variance = np.log(variance)

    @staticmethod
    def at(constants, t):
        return torch.from_numpy(constants)[t].float()[:, None]

    def posterior_mean(self, clean, noisy, t):
        from_clean = self.beta * np.sqrt(self.before) / (1 - self.a)
        from_noisy = (1 - self.before) * np.sqrt(1 - self.beta) / (1 - self.a)
        return self.at(from_clean, t) * clean + self.at(from_noisy, t) * noisy

    def noised(self, x, t, noise):
        return self.at(np.sqrt(self.a), t) * x + self.at(np.sqrt(1 - self.a), t) * noise

    def reverse(self, noisy, t, out):
        """Mean and log variance of a reverse step, from the network's output."""
        noise, logits = out.chunk(2, dim=-1)
        clean = self.at(np.sqrt(1 / self.a), t) * noisy
        clean = clean - self.at(np.sqrt(1 / self.a - 1), t) * noise
        upper, fraction = self.at(np.log(self.beta), t), (logits + 1) / 2
        log_variance = fraction * upper + (1 - fraction) * self.at(self.log_variance, t)
        return self.posterior_mean(clean, noisy, t), log_variance


def losses(chain, head, x, t, noise, z):
    """The squared error of the noise and the variational term, in bits per dim, of every token."""
    noisy = chain.noised(x, t, noise)
    out = head(noisy, t, z)
    predicted, logits = out.chunk(2, dim=-1)
    squared = (noise - predicted).square().mean(-1)
    # The variational term trains the variance alone.
    mean, log_variance = chain.reverse(noisy, t, torch.cat([predicted.detach(), logits], dim=-1))
    true_mean, true_log_variance = (
        chain.posterior_mean(x, noisy, t),
        chain.at(chain.log_variance, t),
    )
    ratio = true_log_variance - log_variance
    kl = 0.5 * (ratio.exp() - 1 - ratio + (true_mean - mean).square() * (-log_variance).exp())
    nats = torch.where(t[:, None] == 0, -bin_log_mass(x, mean, 0.5 * log_variance), kl)
    return squared, nats.mean(-1) / math.log(2)


def bin_log_mass(x, mean, log_std):
    """Log of a Gaussian's mass in the bin of width 2/255 round x; the bins at -1 and 1 are open."""

    def cdf(v):  # improved diffusion's approximation
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    inverse = (-log_std).exp()
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


@torch.no_grad()
def sample(head, z, z_null, noise, guidance, temperature):
    """Tokens by `len(noise) - 1` ancestral steps with guidance.

    Args:
        noise: [S + 1, N, C]; row 0 is where the chain begins, row s + 1 what step s injects.
    """
    steps = len(noise) - 1
    kept = [round(i * (STEPS - 1) / (steps - 1)) for i in range(steps)]
    chain, x = Chain(kept), noise[0]
    for step in reversed(range(steps)):
        told = torch.full((len(x),), kept[step])
        out, free = head(x, told, z), head(x, told, z_null)
        predicted, logits = out.chunk(2, dim=-1)
        unconditional = free.chunk(2, dim=-1)[0]
        predicted = unconditional + guidance * (predicted - unconditional)
        t = torch.full((len(x),), step)
        x, log_variance = chain.reverse(x, t, torch.cat([predicted, logits], dim=-1))
        if step > 0:
            x = x + temperature * (0.5 * log_variance).exp() * noise[step + 1]
    return x


def train(head, chain, draw, steps, seed):
    """Some steps of Adam: the chain of a random head ends anywhere."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(steps):
        x, z = draw()
        t = torch.randint(0, STEPS, (len(x),))
        squared, bits = losses(chain, head, x, t, torch.randn_like(x), z)
        loss = (squared + bits).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    return loss.item()
