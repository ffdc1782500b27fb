"""The PyTorch side of `unifluid benchmark against_torch`, run in an environment of its own.

The same small model of the usual parts: Gemma-2 of transformers and MAR's diffusion head (that of
tests/golden/mar.py), trained by AdamW with clipping and an average of the weights. Reads one
command a line, answers with one line of JSON.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Gemma2Config, Gemma2Model

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
import mar


class Model(nn.Module):
    """UniFluid without a vision tower, on rows of T tokens of text and N of an image."""

    def __init__(self, sizes):
        super().__init__()
        # Eager attention: the others leave the soft cap out.
        self.gemma = Gemma2Model(Gemma2Config(**sizes["gemma"], attn_implementation="eager"))
        width = self.gemma.config.hidden_size
        self.head = mar.Head(sizes["token_dim"], width, *sizes["head"])
        self.latent_in = nn.Linear(sizes["token_dim"], width)
        self.content_embed = nn.Parameter(torch.empty(sizes["image_tokens"], width))
        self.target_embed = nn.Parameter(torch.empty(sizes["image_tokens"], width))

    def loss(self, batch, latents, t, noise, text_weight):
        """The loss of a batch.

        Args:
            batch: `tokens` [B, T + 1], the last of which asks for an image, and `order` [B, N].
            latents: [B, N, C] in that order.
            t, noise: [R, B, N] and [R, B, N, C].
        """
        tokens, order = batch["tokens"], batch["order"]
        text = tokens.shape[1] - 1
        x = self.gemma.embed_tokens(tokens)
        previous = self.latent_in(latents[:, :-1]) + self.content_embed[order[:, :-1]]
        x = torch.cat([x, previous], dim=1)
        target = self.target_embed[order]
        x = torch.cat([x[:, :text], x[:, text:] + target], dim=1)
        hidden = self.gemma(inputs_embeds=x, use_cache=False).last_hidden_state
        cap = self.gemma.config.final_logit_softcapping
        logits = hidden[:, : text - 1] @ self.gemma.embed_tokens.weight.T
        logits = cap * torch.tanh(logits / cap)
        loss_text = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:text].flatten())
        z = hidden[:, text:] + target
        draws = len(t)
        squared, bits = mar.losses(
            CHAIN,
            self.head,
            latents.expand(draws, -1, -1, -1).flatten(0, 2),
            t.flatten(),
            noise.flatten(0, 2),
            z.expand(draws, -1, -1, -1).flatten(0, 2),
        )
        return (squared + bits).mean() + text_weight * loss_text


CHAIN = mar.Chain()


class Side:
    """What the commands act on."""

    def make(self, folder):
        """Random weights, written for the other side to read."""
        self.folder = Path(folder)
        self.sizes = json.loads((self.folder / "sizes.json").read_text())
        torch.manual_seed(0)
        torch.set_num_threads(self.sizes["threads"])
        self.model = Model(self.sizes)
        with torch.no_grad():
            for p in self.model.parameters():
                p.normal_(0, 0.05)  # a fresh head returns nothing and passes nothing back
        self.model.gemma.save_pretrained(self.folder / "gemma")
        head = {
            f"diffloss.net.{k}": v.contiguous() for k, v in self.model.head.state_dict().items()
        }
        save_file(head, self.folder / "head.safetensors")
        return {"torch": torch.__version__}

    def read(self):
        """The other side's remaining weights and its numbers."""
        numbers = {k: torch.from_numpy(v) for k, v in np.load(self.folder / "batch.npz").items()}
        with torch.no_grad():
            self.model.latent_in.weight.copy_(numbers.pop("latent_kernel").T)
            self.model.latent_in.bias.copy_(numbers.pop("latent_bias"))
            self.model.content_embed.copy_(numbers.pop("content_embed"))
            self.model.target_embed.copy_(numbers.pop("target_embed"))
        self.batch = {"tokens": numbers["tokens"].long(), "order": numbers["order"].long()}
        self.mean, self.std = numbers["mean"], numbers["std"]
        self.given = numbers["latents"], numbers["t"].long(), numbers["noise"]
        self.parameters = list(self.model.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            self.sizes["lr"],
            betas=(0.9, 0.95),
            weight_decay=self.sizes["weight_decay"],
            fused=True,
        )
        return {}

    def step(self, latents, t, noise):
        loss = self.model.loss(self.batch, latents, t, noise, self.sizes["text_weight"])
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.sizes["clip"], foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 0.005)
        return loss.item(), norm.item()

    def check(self):
        """Losses and gradient norms of two steps on given numbers."""
        return {"steps": [self.step(*self.given), self.step(*self.given)]}

    def time(self, steps):
        """Seconds of each of some steps, with noise of its own."""
        shape = self.given[2].shape
        seconds = []
        for _ in range(int(steps)):
            begun = time.perf_counter()
            latents = self.mean + self.std * torch.randn_like(self.mean)
            t = torch.randint(0, mar.STEPS, shape[:-1])
            self.step(latents, t, torch.randn(shape))
            seconds.append(time.perf_counter() - begun)
        return {"seconds": seconds}


def main():
    side = Side()
    for line in sys.stdin:
        name, *arguments = line.split()
        print(json.dumps(getattr(side, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
