"""A tiny UniFluid for the tests of decoding, its prompts and pictures, and the pass of training."""

import dataclasses
import functools

import jax
import numpy as np

from unifluid_jax import decode, sequence
from unifluid_jax.models.functional import Functional
from unifluid_jax.models.gemma import GemmaConfig
from unifluid_jax.models.head import HeadConfig
from unifluid_jax.models.siglip import SiglipConfig
from unifluid_jax.models.unifluid import UniFluid, UniFluidConfig
from unifluid_jax.sequence import Latents, Layout

C, N, WIDTH, VOCAB, EOS = 3, 4, 16, 30, 1
# The window is shorter than every sequence; the depth ends with half a period of the pattern.
CONFIG = UniFluidConfig(
    backbone=GemmaConfig(
        vocab_size=VOCAB, width=WIDTH, depth=3, mlp_dim=32, heads=2, kv_heads=1, head_dim=8,
        window=4, scan_layers=False,
    ),
    vision=SiglipConfig(image_size=8, patch_size=4, width=16, depth=1, heads=2, mlp_dim=16),
    head=HeadConfig(token_dim=C, cond_dim=WIDTH, width=16, depth=1, out_dim=C),
    image_tokens=N,
)  # fmt: skip
LAYOUTS = {
    "causal": Layout(
        bos=2, eos=EOS, boi=4, null=5, separator=6, vision_tokens=4, image_tokens=N, token_dim=C
    )
}
LAYOUTS["bidirectional"] = dataclasses.replace(LAYOUTS["causal"], bidirectional_prefix=True)
PROMPTS = [[10], [11, 12, 13, 14, 15], [16, 17, 18]]


def make_model(**backbone):
    """The tiny model; `backbone` changes its config."""
    config = dataclasses.replace(CONFIG, backbone=dataclasses.replace(CONFIG.backbone, **backbone))
    return Functional(lambda rngs: UniFluid(config, rngs=rngs))


def make_params(model):
    params = jax.jit(model.init)(jax.random.key(0))
    # Off the zero initialisation of the head, so that z matters.
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )


def latents(seed):
    mean = np.random.default_rng(seed).normal(size=(N, C)).astype(np.float32)
    return Latents(mean, np.zeros_like(mean))


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)


def order(seed):
    return np.random.default_rng(seed).permutation(N).astype(np.int32)


def sequences(layout, task, targets=None, drop=False):
    """One per prompt: prefixes, or whole sequences with `targets` [B, N, C] in raster order."""
    made = []
    for i, prompt in enumerate(PROMPTS):
        target = None
        if targets is not None:
            target = Latents(np.asarray(targets[i]), np.zeros((N, C), np.float32))
        if task == "generate":
            one = sequence.generation(layout, prompt, target, order(i))
        else:
            one = sequence.editing(layout, picture(i), latents(i), prompt, target, order(i))
        made.append(sequence.dropped(layout, one) if drop else one)
    return made


@functools.partial(jax.jit, static_argnums=0)
def run_full(model, params, batch):
    return model.bind(params).hidden(batch, batch["latent_mean"])


def full(model, params, rows):
    """Hidden states of whole sequences by the pass that training uses."""
    return run_full(model, params, decode.stack(rows, 20))


def entropy():
    return np.random.default_rng(1).integers(2**32, size=(len(PROMPTS), 2), dtype=np.uint32)
